#!/usr/bin/env python3
"""What the cluster costs over its engine alone, on one machine: `antiphon up` (one prefill and one decode worker),
asked over HTTP by streaming clients, beside engine_bench, in turns.

    bench/cluster/overhead.py [--rounds 5] [--streams 16] [--tokens 320] [--threads 2] [--json FILE]

Generation: prompts of 128 tokens; tokens/s between the moment when every stream has begun and the one when the first
ends, beside `engine_bench MODEL THREADS generate STREAMS` over as many tokens from the same context on. First token: prompts of 512 tokens that nothing has
cached, one at a time, milliseconds from the request's last byte sent to the first token received, beside the time in
which an engine_bench that stands by computes such a prompt and draws its token. Prints medians (lowest-highest) as a
Markdown table.
"""
import argparse
import json
import os
import pathlib
import random
import selectors
import socket
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
os.environ.setdefault("ANTIPHON_MODEL", str(pathlib.Path(os.environ.get("XDG_DATA_HOME") or pathlib.Path.home() / ".local/share")
                                            / "antiphon/models/SmolLM2-135M-Instruct.Q4_1.gguf"))
from cluster import BIN, Cluster, model_path  # noqa: E402

WORDS = "sea boat old net grey cloud near rock bird wait fish house road tree light water hand stone door wind".split()
DATA = b"\ndata: "


def prompt(length, seed):
    """`length` words, of a token each; no other seed shares a block of them. Plain text goes on as plain text, so that
    every token drawn is an event."""
    rng = random.Random(seed)
    return "".join(" " + rng.choice(WORDS) for _ in range(length))


class Stream:
    """One streaming completion over a socket of its own; counts events without reading them."""

    def __init__(self, netloc, tokens, length, offset):
        host, port = netloc.rsplit(":", 1)
        body = json.dumps({"prompt": prompt(length, offset), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
                           "stream": True}).encode()
        self.socket = socket.create_connection((host, int(port)), timeout=120)
        self.socket.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
                            b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        self.sent = time.perf_counter()
        self.events, self.first, self.last, self.tail, self.head = 0, None, None, b"", b""

    def read(self):
        """False: the stream has ended."""
        if self.socket.fileno() < 0:
            return False
        data = self.socket.recv(1 << 16)
        now = time.perf_counter()
        if len(self.head) < 12:
            self.head += data[:12]
            if len(self.head) >= 12 and not self.head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"refused: {data.decode(errors='replace')}")
        # A marker cut in two by the network is found when its rest comes.
        text = self.tail + data
        found = text.count(DATA)
        self.tail = text[-(len(DATA) - 1):] if data else b""
        if found:
            self.events += found
            self.first = self.first or now
            self.last = now
        if data:
            return True
        self.socket.close()
        return False


def generation(netloc, streams, tokens, seed):
    """Tokens/s of all streams while all run, tokens of each meanwhile and their mean context at the beginning."""
    waiting = selectors.DefaultSelector()
    all_streams = [Stream(netloc, tokens, 128, seed * 1000 + i) for i in range(streams)]
    for stream in all_streams:
        waiting.register(stream.socket, selectors.EVENT_READ, stream)
    begun = counted = None
    while True:
        for key, _ in waiting.select(60):
            if not key.data.read() or key.data.events >= tokens:
                if key.data.events < 0.99 * tokens:
                    raise RuntimeError(f"{tokens} tokens came in {key.data.events} events: some have no text of their own")
                if begun is None:
                    raise RuntimeError("a stream ended before the last had begun; ask for more --tokens")
                ended = time.perf_counter()
                total = sum(s.events for s in all_streams)
                waiting.close()
                for stream in all_streams:
                    while stream.read():
                        pass
                each = (total - counted) // streams
                return (total - counted) / (ended - begun), each, 128 + counted // streams
        if begun is None and all(s.events for s in all_streams):
            begun, counted = time.perf_counter(), sum(s.events for s in all_streams)


def first_token_ms(netloc, seed):
    stream = Stream(netloc, 1, 512, 500_000 + seed)
    while stream.read():
        pass
    return 1e3 * (stream.first - stream.sent)


def engine(threads, *case):
    done = subprocess.run([str(BIN / "engine_bench"), model_path(), str(threads), *map(str, case)], check=True,
                          capture_output=True, text=True)
    return json.loads(done.stdout)["tokens_per_s"]


class Engine:
    """One that stands by, and computes a prompt when asked."""

    def __init__(self, threads, length):
        self.process = subprocess.Popen([str(BIN / "engine_bench"), model_path(), str(threads), "asked", str(length)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.process.stdout.readline()

    def first_token_ms(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return 1e3 * float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def cell(values):
    return f"{statistics.median(values):,.1f} ({min(values):,.1f}-{max(values):,.1f})"


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--streams", type=int, default=16)
    arguments.add_argument("--tokens", type=int, default=320)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--json", type=pathlib.Path)
    options = arguments.parse_args()
    figures = {"engine tokens/s": [], "cluster tokens/s": [], "engine ms": [], "cluster ms": []}
    args = [f"--worker.threads={options.threads}", f"--worker.max_sequences={max(64, options.streams)}"]
    with Cluster(args=args) as cluster:
        for length in 128, 512:  # the words are tokens; and all is warm
            answer = cluster.post("/v1/completions", {"prompt": prompt(length, -length), "max_tokens": 1})
            if answer["usage"]["prompt_tokens"] != length:
                raise RuntimeError(f"{length} words are {answer['usage']['prompt_tokens']} tokens of this model")
        generation(cluster.netloc, 2, 64, 999)
        for number in range(options.rounds):
            speed, each, context = generation(cluster.netloc, options.streams, options.tokens, number)
            figures["cluster tokens/s"].append(speed)
            figures["engine tokens/s"].append(engine(options.threads, "generate", options.streams, each, context))
            alone = Engine(options.threads, 512)
            for i in range(10):
                turn = [lambda: figures["engine ms"].append(alone.first_token_ms()),
                        lambda: figures["cluster ms"].append(first_token_ms(cluster.netloc, 10 * number + i))]
                for ask in turn if i % 2 else reversed(turn):
                    time.sleep(0.3)  # a host that rations processor time stops who takes all of it for a second
                    ask()
            alone.close()
    rate = statistics.median(figures["cluster tokens/s"]) / statistics.median(figures["engine tokens/s"])
    more = statistics.median(figures["cluster ms"]) - statistics.median(figures["engine ms"])
    print("| | engine alone | cluster over HTTP | |")
    print("|---|---|---|---|")
    print(f"| generation, {options.streams} streams, tokens/s | {cell(figures['engine tokens/s'])} | "
          f"{cell(figures['cluster tokens/s'])} | {rate:.2f} of it |")
    print(f"| first token of 512, ms | {cell(figures['engine ms'])} | {cell(figures['cluster ms'])} | {more:+.1f} ms |")
    if options.json:
        options.json.write_text(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
