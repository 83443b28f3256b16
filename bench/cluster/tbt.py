#!/usr/bin/env python3
"""Time between tokens of a running stream, alone and while long prompts are prefilled next door, on one machine:
with prefill's engine threads standing back (worker.prefill_nice) and without.

    bench/cluster/tbt.py [--rounds 3] [--tokens 200] [--nice 0,10]

Starts `antiphon up` for each setting and round, in turns, and prints a Markdown table: over the rounds, the
median (lowest-highest) of each one's p50, p99 and maximum in ms, and of the prompt tokens/s prefilled meanwhile.
"""
import argparse
import os
import pathlib
import random
import statistics
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
os.environ.setdefault("ANTIPHON_MODEL", str(pathlib.Path(os.environ.get("XDG_DATA_HOME") or pathlib.Path.home() / ".local/share")
                                            / "antiphon/models/SmolLM2-135M-Instruct.Q4_1.gguf"))
from cluster import Cluster, HttpError  # noqa: E402

WORDS = "the sea and a boat with old nets under grey clouds near some rocks where birds wait for fish".split()


def stream_times(cluster, tokens):
    """Seconds between the events of a stream of `tokens` tokens."""
    at = []
    cluster.stream("/v1/completions", {"prompt": "Once upon a time", "max_tokens": tokens, "temperature": 0, "ignore_eos": True},
                   timeout=300, on_event=lambda _: at.append(time.perf_counter()))
    return [b - a for a, b in zip(at, at[1:])]


def prompts_next_door(cluster, stop, counted, seed):
    rng = random.Random(seed)
    while not stop.is_set():
        prompt = " ".join(rng.choice(WORDS) for _ in range(1500))
        try:
            answer = cluster.post("/v1/completions", {"prompt": prompt, "max_tokens": 1}, timeout=120)
        except HttpError as e:
            if e.status not in (429, 503):
                raise
            time.sleep(0.2)
            continue
        counted.append(answer["usage"]["prompt_tokens"])


def one_round(nice, tokens):
    with Cluster(args=[f"--worker.prefill_nice={nice}"]) as cluster:
        stream_times(cluster, 16)
        alone = stream_times(cluster, tokens)
        stop, counted = threading.Event(), []
        clients = [threading.Thread(target=prompts_next_door, args=(cluster, stop, counted, i)) for i in range(2)]
        for c in clients:
            c.start()
        time.sleep(1)
        del counted[:]
        began = time.perf_counter()
        beside = stream_times(cluster, tokens)
        rate = sum(counted) / (time.perf_counter() - began)
        stop.set()
        for c in clients:
            c.join()
    return alone, beside, rate


def describe(times):
    ordered = sorted(times)
    return [1e3 * statistics.median(ordered), 1e3 * ordered[int(len(ordered) * 0.99)], 1e3 * ordered[-1]]


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--tokens", type=int, default=200)
    arguments.add_argument("--nice", default="0,10")
    options = arguments.parse_args()
    settings = [int(n) for n in options.nice.split(",")]
    results = {n: [] for n in settings}
    for _ in range(options.rounds):
        for n in settings:
            alone, beside, rate = one_round(n, options.tokens)
            results[n].append(describe(alone) + describe(beside) + [rate])
    print("| prefill_nice | alone: p50 | p99 | max | beside prefill: p50 | p99 | max | prompt tokens/s meanwhile |")
    print("|---|---|---|---|---|---|---|---|")
    for n in settings:
        cells = [f"{statistics.median(c):,.1f} ({min(c):,.1f}-{max(c):,.1f})" for c in zip(*results[n])]
        print(f"| {n} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
