"""Two hosts (network namespaces joined by a veth pair), each with a store and a worker: prefill on
one, decode on the other, KV over TCP; the tokens equal the one-host run, and blocks did travel."""
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

from cluster import BIN, SKIP, Cluster, model_path

PROMPT = "The history of the sea is long. " * 40 + "In the beginning"
BODY = {"prompt": PROMPT, "max_tokens": 48, "temperature": 0, "ignore_eos": True}
ADDRESS = {"a": "10.77.0.1", "b": "10.77.0.2"}


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Hosts:
    def __init__(self):
        self.temp = tempfile.TemporaryDirectory(prefix="antiphon-hosts-")
        self.tag = f"ap{os.getpid() % 100000}"
        self.processes = []
        # A network namespace lives as long as its process: no mounts, which not every root can have.
        self.holders = {h: subprocess.Popen(["unshare", "--net", "--", "sleep", "900"]) for h in ADDRESS}
        own = os.readlink("/proc/self/ns/net")
        for holder in self.holders.values():
            while holder.poll() is None and os.readlink(f"/proc/{holder.pid}/ns/net") == own:
                time.sleep(0.01)
            if holder.poll() is not None:
                print("skipped: network namespaces cannot be made here")
                sys.exit(SKIP)
        run("ip", "link", "add", self.tag + "va", "netns", str(self.holders["a"].pid), "type", "veth", "peer", "name",
            self.tag + "vb", "netns", str(self.holders["b"].pid))
        for host, address in ADDRESS.items():
            device = f"{self.tag}v{host}"
            run(*self.inside(host), "ip", "link", "set", "lo", "up")
            run(*self.inside(host), "ip", "addr", "add", f"{address}/24", "dev", device)
            run(*self.inside(host), "ip", "link", "set", device, "up")
        self.model = model_path()

    def inside(self, host):
        return ["nsenter", "--net", f"--target={self.holders[host].pid}", "--"]

    def config(self, host):
        address = ADDRESS[host]
        folder = pathlib.Path(self.temp.name) / host
        folder.mkdir(exist_ok=True)
        path = folder / "antiphon.yaml"
        if path.exists():
            return str(path)  # somebody may be reading it
        path.write_text(f"""version: 1
cluster:
  name: two-hosts
  conductors: ["{ADDRESS['a']}:7401"]
  runtime_dir: {folder}/run
models:
  - name: smollm2
    path: {self.model}
gateway:
  http: {{listen: "127.0.0.1:8000"}}
conductor:
  rpc: {{listen: "{address}:7401"}}
kvstore:
  rpc: {{listen: "{address}:7402"}}
  data: {{listen: "{address}:7403"}}
  pool: 512MiB
worker:
  prefill: {{listen: "{address}:7404"}}
  decode: {{listen: "{address}:7405"}}
""")
        return str(path)

    def start(self, host, daemon):
        log = open(f"{self.temp.name}/{host}-{daemon}.log", "w")
        self.processes.append(subprocess.Popen(
            [*self.inside(host), str(BIN / f"antiphon-{daemon}"), "--config", self.config(host),
             f"--node={daemon}@{host}"], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL))

    def fetch(self, host, url, body=None, timeout=60):
        """curl-like, from inside a host: (status, text)."""
        script = (
            "import sys, urllib.request, urllib.error\n"
            "data = sys.stdin.buffer.read() or None\n"
            "r = urllib.request.Request(sys.argv[1], data, {'Content-Type': 'application/json'})\n"
            "try:\n"
            "    a = urllib.request.urlopen(r, timeout=float(sys.argv[2]))\n"
            "    print(a.status); sys.stdout.write(a.read().decode())\n"
            "except urllib.error.HTTPError as e:\n"
            "    print(e.code); sys.stdout.write(e.read().decode())\n")
        result = subprocess.run([*self.inside(host), sys.executable, "-c", script, url, str(timeout)],
                                input=json.dumps(body).encode() if body is not None else b"", capture_output=True, timeout=timeout + 10)
        if result.returncode != 0:
            return 0, result.stderr.decode()[-300:]
        status, _, text = result.stdout.decode().partition("\n")
        return int(status), text

    def wait_ready(self, seconds=60):
        deadline = time.time() + seconds
        answer = None
        while time.time() < deadline:
            answer = self.fetch("a", "http://127.0.0.1:8000/readyz", timeout=2)
            if answer[0] == 200:
                return
            time.sleep(0.2)
        raise AssertionError(f"not ready: {answer}\n{self.logs()}")

    def logs(self):
        return "".join(f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}\n" for p in sorted(pathlib.Path(self.temp.name).glob("*.log")))

    def metric(self, host, port, name):
        """Sum of a metric's samples."""
        status, page = self.fetch(host, f"http://127.0.0.1:{port}/metrics", timeout=5)
        assert status == 200, page
        return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? ([0-9.e+-]+)$", page, re.M))

    def close(self):
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        for holder in self.holders.values():
            holder.kill()
            holder.wait()
        self.temp.cleanup()


def main():
    if os.geteuid() != 0:
        print("skipped: network namespaces need root")
        return SKIP
    with Cluster(prefill=1, decode=1) as cluster:
        expected = cluster.post("/v1/completions", BODY)["choices"][0]["text"]
    hosts = Hosts()
    try:
        for host, daemon in (("a", "conductor"), ("a", "kvstore"), ("b", "kvstore"), ("a", "prefill"), ("b", "decode"), ("a", "gateway")):
            hosts.start(host, daemon)
        hosts.wait_ready()
        for turn in range(3):
            status, text = hosts.fetch("a", "http://127.0.0.1:8000/v1/completions", BODY)
            assert status == 200, (status, text, hosts.logs())
            answer = json.loads(text)
            assert answer["choices"][0]["text"] == expected, (turn, answer["choices"][0]["text"], expected)
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert (cached > 0) == (turn > 0), (turn, cached)
        pulled = hosts.metric("b", 7502, "antiphon_transfer_bytes_total")
        assert pulled > 1 << 20, f"host b pulled only {pulled} bytes"
        for host in ADDRESS:
            deadline = time.time() + 10
            while hosts.metric(host, 7502, "antiphon_kv_leases") != 0:
                assert time.time() < deadline, f"pins leak on host {host}"
                time.sleep(0.2)
        print(f"ok: tokens equal, host b pulled {pulled / 1e6:.1f} MB")
    except BaseException:
        print(hosts.logs(), file=sys.stderr)
        raise
    finally:
        hosts.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
