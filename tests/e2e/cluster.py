"""Starts `antiphon up` for a test and talks to it. Standard library only.

    with Cluster(prefill=1, decode=1) as cluster:
        cluster.post("/v1/completions", {...})
"""
import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("ANTIPHON_BIN", ROOT / "build/release/bin"))
SKIP = 77


def model_path():
    """The small model's file; the test is skipped without one."""
    path = os.environ.get("ANTIPHON_MODEL", "")
    if not path or not os.path.exists(path):
        print("skipped: ANTIPHON_MODEL names no file")
        sys.exit(SKIP)
    return path


class HttpError(Exception):
    def __init__(self, status, headers, body):
        super().__init__(f"{status}: {body}")
        self.status, self.headers, self.body = status, headers, body


def children_of(pid):
    """{pid: command line} of the direct children."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = pathlib.Path(f"/proc/{entry}/stat").read_text()
            if int(stat.rsplit(")", 1)[1].split()[1]) == pid:
                found[int(entry)] = pathlib.Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ValueError, IndexError):
            continue
    return found


class Cluster:
    def __init__(self, prefill=1, decode=1, args=(), ready_timeout=90, model=None):
        self.temp = tempfile.TemporaryDirectory(prefix="antiphon-e2e-")
        env = dict(os.environ, XDG_RUNTIME_DIR=self.temp.name + "/run", XDG_STATE_HOME=self.temp.name + "/state")
        os.makedirs(env["XDG_RUNTIME_DIR"], mode=0o700)
        self.env = env
        self.log_path = self.temp.name + "/up.log"
        self.log = open(self.log_path, "w")
        self.process = subprocess.Popen(
            [str(BIN / "antiphon"), "up", "--name", "e2e", "--listen", "127.0.0.1:0", "--model", model or model_path(),
             "--prefill", str(prefill), "--decode", str(decode), "--kvstore.pool=512MiB", *args],
            stdout=self.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
        deadline = time.time() + ready_timeout
        self.base_url = None
        while self.base_url is None:
            for line in self.log_text().splitlines():
                if line.startswith("ready http"):
                    self.base_url = line.split()[1].rstrip("/")
            if self.base_url is None:
                if self.process.poll() is not None or time.time() > deadline:
                    text = self.all_logs()
                    self.close()
                    raise RuntimeError(f"the cluster did not get ready:\n{text}")
                time.sleep(0.05)
        self.netloc = urllib.parse.urlparse(self.base_url).netloc

    def log_text(self):
        return pathlib.Path(self.log_path).read_text(errors="replace")

    def all_logs(self):
        text = self.log_text()
        for path in sorted(pathlib.Path(self.temp.name + "/state").rglob("*.log")):
            text += f"\n--- {path.name}\n" + path.read_text(errors="replace")[-4000:]
        return text

    def children(self, name):
        """Pids of the children whose program is antiphon-NAME, ascending."""
        return sorted(pid for pid, command in children_of(self.process.pid).items() if f"antiphon-{name}" in command.split(" ")[0])

    def kill9(self, name, index=0):
        pid = self.children(name)[index]
        os.kill(pid, signal.SIGKILL)
        return pid

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind is not None and kind is not SystemExit:
            print(self.all_logs(), file=sys.stderr)
        self.close()
        self.temp.cleanup()

    # ---- HTTP -----------------------------------------------------------------------------------

    def request(self, method, path, body=None, headers=None, timeout=60):
        """(status, headers, bytes) of one exchange; `body` may be bytes or what JSON can hold."""
        connection = http.client.HTTPConnection(self.netloc, timeout=timeout)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def post(self, path, body, **options):
        status, headers, data = self.request("POST", path, body, **options)
        if status != 200:
            raise HttpError(status, headers, data.decode(errors="replace"))
        return json.loads(data)

    def get(self, path):
        status, headers, data = self.request("GET", path)
        if status != 200:
            raise HttpError(status, headers, data.decode(errors="replace"))
        return data.decode()

    def stream(self, path, body, timeout=60, on_event=None):
        """Events of an SSE answer as parsed JSON, "[DONE]" included; raises HttpError when not 200."""
        connection = http.client.HTTPConnection(self.netloc, timeout=timeout)
        try:
            connection.request("POST", path, json.dumps({**body, "stream": True}).encode(), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise HttpError(response.status, dict(response.getheaders()), response.read().decode(errors="replace"))
            events = []
            for raw in response:
                line = raw.decode().rstrip("\r\n")
                if not line.startswith("data: "):
                    continue
                event = line[6:] if line == "data: [DONE]" else json.loads(line[6:])
                events.append(event)
                if on_event:
                    on_event(len(events))
            return events
        finally:
            connection.close()

    def metric(self, name):
        """Sum of the gateway's series of that name."""
        found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", self.get("/metrics"), re.M)
        assert found, f"{name} is missing"
        return sum(float(v) for v in found)

    def wait_metric(self, name, good, seconds=10):
        deadline = time.time() + seconds
        while not good(self.metric(name)):
            assert time.time() < deadline, f"{name} is {self.metric(name)} after {seconds} s"
            time.sleep(0.05)

    # ---- operations -----------------------------------------------------------------------------

    def runtime_file(self):
        """What `up` tells other tools of itself."""
        return json.loads(next(pathlib.Path(self.env["XDG_RUNTIME_DIR"]).rglob("cluster.json")).read_text())

    def run_cli(self, *args, **options):
        return subprocess.run([str(BIN / "antiphon"), *args], capture_output=True, text=True, env=self.env, timeout=60, **options)
