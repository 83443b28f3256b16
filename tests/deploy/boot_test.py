"""Boots systemd on the installed tree, in namespaces of its own, as deploy/README.md says, and uses the
cluster: units get ready in their sandbox, reload, come back when they die, stay down when their
configuration is bad, and drain in order. Needs root, cgroup v2 and the model."""
import concurrent.futures
import ctypes
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request

from stage import DAEMONS, ROOT, SERVICES, SKIP, install, main

# In a root made of this machine's, with the installed tree above it. Of systemd's own units only targets
# and the journal stay, so that nothing of this machine is started twice.
BOOT = r"""
set -e
cd "$1"
mkdir work root
mount -t overlay overlay -o lowerdir=/,upperdir=up,workdir=work root
cd root
find etc/systemd/system etc/systemd/system.conf.d usr/lib/systemd/system-generators -mindepth 1 -delete 2>/dev/null || true
find usr/lib/systemd/system -mindepth 1 ! -name '*.target' ! -name 'systemd-journald*' -delete 2>/dev/null || true
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mount --rbind /dev dev
cp "$3"/* etc/antiphon/conf.d/
chroot . systemd-sysusers
chroot . systemd-tmpfiles --create antiphon.conf
touch "var/lib/antiphon/models/$(basename "$4")"
mount --bind "$2" "var/lib/antiphon/models/$(basename "$4")"
rm -rf var/log/journal
pivot_root . mnt
umount -l mnt
export container=antiphon-test
systemctl enable antiphon.target antiphon-conductor antiphon-kvstore antiphon-prefill antiphon-decode antiphon-gateway
exec /lib/systemd/systemd --unit=multi-user.target --log-target=journal --show-status=false
"""
# Drains at once and takes little memory; and a watchdog that one need not wait for.
SETTINGS = """kvstore: {pool: 256MiB, drain: {delay: 0s, deadline: 20s}}
conductor: {drain: {delay: 0s}}
worker: {threads: 1, drain: {delay: 0s, deadline: 20s}}
gateway: {drain: {delay: 0s, deadline: 20s}}
"""


def skip(why):
    print("skipped:", why)
    sys.exit(SKIP)


def cgroup_root():
    for line in pathlib.Path("/proc/self/mounts").read_text().splitlines():
        _, folder, kind, options = line.split()[:4]
        if kind == "cgroup2" and "rw" in options.split(","):
            return pathlib.Path(folder)
    return None


def wait_for(what, predicate, timeout=60):
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what}\n{machine.journal()}\n{machine.console()}")
        time.sleep(0.05)
    return value


class Machine:
    def __init__(self, model):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="antiphon-boot-"))
        self.init = None  # its process 1, once it runs
        self.cgroup = cgroup_root() / f"antiphon-boot-{os.getpid()}"
        self.cgroup.mkdir()
        # The overlay's upper layer cannot be an overlay itself, which a container's /tmp may be.
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", self.folder], check=True)
        install(self.folder / "up")
        conf = self.folder / "conf.d"
        conf.mkdir()
        (conf / "10-test.yaml").write_text(SETTINGS)
        shipped = re.search(r"path: (\S+\.gguf)", (ROOT / "deploy/config/antiphon.yaml").read_text()).group(1)
        self.log = open(self.folder / "console", "w")
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--cgroup", "--uts", "--ipc", "--",
             "bash", "-c", BOOT, "boot", self.folder, model, conf, shipped],
            stdout=self.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            preexec_fn=lambda: (self.cgroup / "cgroup.procs").write_text("0"))

    def inside(self, *command):
        """Return code and output of a command on the machine."""
        if self.init is None:
            self.init = self.child()
        done = subprocess.run(["nsenter", "-t", str(self.init), "-m", "-p", "-C", "-u", "-i", "--", *command],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.returncode, done.stdout

    def child(self):
        """Process 1 of the machine as we see it; None before there is one."""
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    fields = pathlib.Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
                    if int(fields[1]) == self.process.pid:
                        return int(entry)
                except (OSError, IndexError):
                    continue
        return None

    def show(self, unit):
        out = self.inside("systemctl", "show", unit)[1]
        return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)

    def journal(self, *units):
        if self.process.poll() is not None:
            return ""
        return self.inside("journalctl", "--no-pager", "-o", "short-monotonic", *[f"--unit={u}" for u in units or ["antiphon*"]])[1]

    def console(self):
        return (self.folder / "console").read_text(errors="replace")

    def booted(self):
        if self.process.poll() is not None:
            raise AssertionError(f"the machine ended:\n{self.console()}")
        child = self.child()
        cmdline = b"" if child is None else pathlib.Path(f"/proc/{child}/cmdline").read_bytes()
        return cmdline.startswith(b"/lib/systemd/systemd") and self.inside("systemctl", "show", "--property=Version")[0] == 0

    def close(self):
        child = self.child()
        if child is not None:
            os.kill(child, signal.SIGKILL)
        elif self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()
        subprocess.run(["umount", "-l", self.folder])
        self.folder.rmdir()
        for path, _, _ in os.walk(self.cgroup, topdown=False):
            wait_to_remove(path)


def wait_to_remove(path, timeout=10):
    """A cgroup is busy until the kernel has reaped the last of its processes."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return os.rmdir(path)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def fetch(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def complete(tokens=8):
    """How many came."""
    body = {"prompt": "The sea is", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return json.loads(fetch("http://127.0.0.1:8000/v1/completions", body))["usage"]["completion_tokens"]


def answers():
    """False while the conductor does not know yet what a new store or worker has free."""
    try:
        return complete() == 8
    except urllib.error.HTTPError as error:
        if error.code != 429:
            raise
        return False


def requests_inflight():
    found = re.findall(r"(?m)^antiphon_requests_inflight\{.*\} (\d+)", fetch("http://127.0.0.1:7500/metrics"))
    return sum(int(n) for n in found)


def all_active():
    return all(machine.show(u)["ActiveState"] == "active" for u in ("antiphon.target", *SERVICES))


class BootTest(unittest.TestCase):
    """In the order of the names: each leaves the cluster as it found it."""

    def test_1_every_unit_gets_ready_in_its_sandbox_and_the_cluster_answers(self):
        wait_for("an answer", answers)
        for unit in SERVICES:
            state = machine.show(unit)
            self.assertEqual((state["SubState"], state["StatusText"], state["NRestarts"]), ("running", "ready", "0"), unit)
            pid = state["MainPID"]
            status = dict(line.split(":\t", 1) for line in machine.inside("cat", f"/proc/{pid}/status")[1].splitlines() if ":\t" in line)
            self.assertNotEqual(status["Uid"].split()[0], "0", unit)
            self.assertEqual((status["NoNewPrivs"], status["Seccomp"], int(status["CapBnd"], 16)), ("1", "2", 0), unit)
            self.assertTrue(machine.inside("cat", f"/proc/{pid}/cgroup")[1].strip().endswith(f"antiphon.slice/{unit}"))
        wait_for("antiphon status is ok", lambda: machine.inside("antiphon", "status")[0] == 0)

    def test_2_operations_ports_have_the_metrics_of_the_alerts(self):
        pages = ""
        for port in re.findall(r"localhost:(\d+)", (ROOT / "deploy/prometheus/prometheus.yml").read_text()):
            pages += fetch(f"http://127.0.0.1:{port}/metrics")
            self.assertIn('"status":"ready"', fetch(f"http://127.0.0.1:{port}/readyz"))
        rules = re.sub(r"\{\{.*?\}\}", "", (ROOT / "deploy/prometheus/alerts.yml").read_text())
        for metric in set(re.findall(r"\bantiphon_\w+", rules)):
            self.assertRegex(pages, rf"(?m)^{metric}\b")

    def test_3_reload_reads_the_configuration_again_and_survives_a_bad_one(self):
        part = "/etc/antiphon/conf.d/20-part.yaml"
        for text, said in (("log: {levle: info}", f"{part}:1: log.levle: unknown key"), ("log: {level: info}", " - reloaded")):
            machine.inside("sh", "-c", f"echo '{text}' >{part}")
            for unit in SERVICES:
                self.assertEqual(machine.inside("systemctl", "reload", unit), (0, ""))
                wait_for(f"{unit} says {said}", lambda: said in machine.journal(unit))
                self.assertEqual(machine.show(unit)["ActiveState"], "active")
        machine.inside("rm", part)

    def test_4_a_killed_store_comes_back_and_nothing_else_ends(self):
        before = {u: machine.show(u)["MainPID"] for u in SERVICES}
        machine.inside("systemctl", "kill", "--signal=KILL", "antiphon-kvstore")
        wait_for("a new store", lambda: machine.show("antiphon-kvstore")["MainPID"] not in ("0", before["antiphon-kvstore.service"]))
        wait_for("all ready", lambda: all_active() and all(machine.show(u)["StatusText"] == "ready" for u in SERVICES))
        wait_for("an answer", answers)
        for unit in SERVICES:
            same = machine.show(unit)["MainPID"] == before[unit]
            self.assertEqual(same, unit != "antiphon-kvstore.service", unit)

    def test_5_a_stalled_worker_is_started_again_by_the_watchdog(self):
        before = machine.show("antiphon-decode")["MainPID"]
        folder = "/run/systemd/system/antiphon-decode.service.d"
        machine.inside("sh", "-c", f"mkdir -p {folder} && printf '[Service]\\nWatchdogSec=3\\n' >{folder}/10-test.conf && "
                       "systemctl daemon-reload && systemctl restart antiphon-decode")
        pid = machine.show("antiphon-decode")["MainPID"]
        self.assertNotEqual(pid, before)
        machine.inside("kill", "-STOP", pid)
        wait_for("a new decode worker", lambda: machine.show("antiphon-decode")["MainPID"] not in ("0", pid))
        self.assertIn("Watchdog timeout", machine.journal("antiphon-decode"))
        wait_for("all ready", lambda: all_active() and all(machine.show(u)["StatusText"] == "ready" for u in SERVICES))
        wait_for("an answer", answers)

    def test_6_a_bad_configuration_keeps_a_daemon_down_at_once(self):
        bad = "/etc/antiphon/conf.d/20-bad.yaml"
        machine.inside("sh", "-c", f"echo 'worker: {{treads: 4}}' >{bad}")
        code, out = machine.inside("systemctl", "restart", "antiphon-prefill")
        state = machine.show("antiphon-prefill")
        self.assertNotEqual(code, 0, out)
        self.assertEqual((state["ActiveState"], state["ExecMainStatus"], state["NRestarts"]), ("failed", "78", "0"))
        self.assertIn(f"{bad}:1: worker.treads: unknown key; did you mean worker.threads?", machine.journal("antiphon-prefill"))
        machine.inside("rm", bad)
        self.assertEqual(machine.inside("systemctl", "start", "antiphon-prefill"), (0, ""))
        wait_for("an answer", answers)

    def test_7_stop_lets_a_request_finish_and_ends_workers_then_the_store_then_the_conductor(self):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            answer = pool.submit(complete, 400)
            wait_for("the request runs", lambda: requests_inflight() == 1)
            self.assertEqual(machine.inside("systemctl", "stop", "antiphon.target")[0], 0)
            self.assertFalse(answer.done())
            self.assertEqual(answer.result(), 400)
        wait_for("all ended", lambda: all(machine.show(u)["ActiveState"] in ("inactive", "failed") for u in SERVICES))
        states = {d: machine.show(f"antiphon-{d}") for d in DAEMONS}
        ended = {d: int(s["InactiveEnterTimestampMonotonic"]) for d, s in states.items()}
        for daemon, state in states.items():
            said = machine.journal(f"antiphon-{daemon}")
            self.assertEqual((state["Result"], state["ExecMainStatus"]), ("success", "0"), said)
            self.assertIn(" - draining", said)
        self.assertLess(max(ended["prefill"], ended["decode"]), ended["kvstore"])
        self.assertLess(max(ended["kvstore"], ended["gateway"]), ended["conductor"])


MODEL = os.environ.get("ANTIPHON_MODEL", "")
if not MODEL or not os.path.exists(MODEL):
    skip("ANTIPHON_MODEL names no file")
if os.geteuid() != 0:
    skip("needs root")
if cgroup_root() is None:
    skip("needs a cgroup v2 hierarchy that can be written")
if not os.path.exists("/lib/systemd/systemd"):
    skip("needs systemd")
if subprocess.run(["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--", "true"],
                  capture_output=True).returncode != 0:
    skip("needs a root folder that is a mount point (a chroot's is not)")
# The default ports are free in a network of our own.
if ctypes.CDLL(None, use_errno=True).unshare(0x40000000) != 0:
    skip("needs network namespaces")
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
machine = Machine(MODEL)
try:
    wait_for("systemd runs", machine.booted)
    wait_for("all units active", all_active, 120)
    wait_for("the gateway is ready", lambda: machine.show("antiphon-gateway")["StatusText"] == "ready")
    unittest.main(verbosity=2, exit=False).result.wasSuccessful() or sys.exit(f"\n{machine.journal()}\n{machine.console()}")
finally:
    machine.close()
