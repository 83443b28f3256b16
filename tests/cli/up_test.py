"""`antiphon up` over fake daemons: what it prints, restarts, refuses and leaves behind.

    up_test.py ANTIPHON FAKE_DAEMON
"""
import json
import os
import pathlib
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

ANTIPHON, FAKE = sys.argv[1:3]


def tiny_gguf(path):
    """A llama of one layer that passes for servable: names and shapes, all zeros."""
    def text(s):
        return struct.pack("<Q", len(s)) + s.encode()

    def u32(key, v):
        return text(key) + struct.pack("<II", 4, v)

    def f32(key, v):
        return text(key) + struct.pack("<If", 6, v)

    hidden, vocab, ff = 32, 8, 32
    keys = [text("general.architecture") + struct.pack("<I", 8) + text("llama"), u32("llama.block_count", 1),
            u32("llama.embedding_length", hidden), u32("llama.feed_forward_length", ff), u32("llama.attention.head_count", 2),
            u32("llama.attention.head_count_kv", 1), u32("llama.context_length", 64), u32("llama.vocab_size", vocab),
            f32("llama.attention.layer_norm_rms_epsilon", 1e-5)]
    tensors = {"token_embd.weight": (hidden, vocab), "output_norm.weight": (hidden,), "blk.0.attn_norm.weight": (hidden,),
               "blk.0.ffn_norm.weight": (hidden,), "blk.0.attn_q.weight": (hidden, hidden), "blk.0.attn_k.weight": (hidden, 16),
               "blk.0.attn_v.weight": (hidden, 16), "blk.0.attn_output.weight": (hidden, hidden), "blk.0.ffn_gate.weight": (hidden, ff),
               "blk.0.ffn_up.weight": (hidden, ff), "blk.0.ffn_down.weight": (ff, hidden)}
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys)
    offset = 0
    for name, dims in tensors.items():
        out += text(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d) for d in dims)
        out += struct.pack("<IQ", 0, offset)
        size = 4
        for d in dims:
            size *= d
        offset += (size + 31) // 32 * 32
    out += b"\0" * (-len(out) % 32) + b"\0" * offset
    pathlib.Path(path).write_bytes(out)


def children_of(pid):
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = pathlib.Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
            if int(stat[1]) == pid and stat[0] != "Z":
                found[pathlib.Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")[0].decode()] = int(entry)
        except (OSError, IndexError):
            continue
    return found


class UpTest(unittest.TestCase):
    def setUp(self):
        self.temp = tempfile.mkdtemp(prefix="antiphon-up-")
        self.bin = pathlib.Path(self.temp, "bin")
        self.bin.mkdir()
        shutil.copy(ANTIPHON, self.bin / "antiphon")
        for name in ("conductor", "kvstore", "prefill", "decode", "gateway"):
            os.link(FAKE, self.bin / f"antiphon-{name}") if os.stat(FAKE).st_dev == os.stat(self.temp).st_dev else \
                shutil.copy(FAKE, self.bin / f"antiphon-{name}")
        self.model = f"{self.temp}/tiny.gguf"
        tiny_gguf(self.model)
        os.makedirs(f"{self.temp}/run", mode=0o700)
        self.env = dict(os.environ, XDG_RUNTIME_DIR=f"{self.temp}/run", XDG_STATE_HOME=f"{self.temp}/state",
                        XDG_DATA_HOME=f"{self.temp}/data")
        self.env.pop("FAKE_FAULT", None)
        self.processes = []

    def tearDown(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            process.stdout.close()
        shutil.rmtree(self.temp)

    def up(self, *args, fault=None, name="t"):
        env = dict(self.env, FAKE_FAULT=fault) if fault else self.env
        process = subprocess.Popen([self.bin / "antiphon", "up", "--name", name, "--model", self.model, "--listen", "127.0.0.1:0",
                                    "--kvstore.pool=16MiB", *args], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process

    def until(self, process, *texts):
        """Reads on until each of `texts` was in a line, in any order; the line of the last one to come."""
        missing, seen = set(texts), ""
        watchdog = threading.Timer(30, process.kill)
        watchdog.start()
        try:
            for line in process.stdout:
                seen += line
                missing -= {text for text in missing if text in line}
                if not missing:
                    return line
        finally:
            watchdog.cancel()
        self.fail(f"{missing} did not come:\n{seen}")

    def wait_for(self, condition, what):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(0.02)
        self.fail(f"waited in vain for {what}")

    def cluster(self, name="t"):
        return json.loads(pathlib.Path(f"{self.temp}/run/antiphon/{name}/cluster.json").read_text())

    def test_serves_and_leaves_nothing_behind(self):
        up = self.up("--prefill", "2")
        line = self.until(up, "ready http://")
        self.assertEqual(line.split()[1], "http://" + self.cluster()["http"])
        self.assertTrue(self.cluster()["ready"])
        self.until(up, "curl http://")
        self.assertEqual(len(children_of(up.pid)), 5)  # names: the two prefill workers share one
        up.send_signal(signal.SIGTERM)
        self.until(up, "stopped")
        self.assertEqual(up.wait(20), 0)
        self.assertFalse(os.path.exists(f"{self.temp}/run/antiphon/t/cluster.json"))
        self.assertEqual({p.name for p in pathlib.Path(f"{self.temp}/state/antiphon/t").iterdir()},
                         {"conductor.log", "kvstore.log", "prefill-0.log", "prefill-1.log", "decode-0.log", "gateway.log"})

    def test_hangup_and_interrupt_stop_too(self):
        for number in (signal.SIGHUP, signal.SIGINT):
            up = self.up()
            self.until(up, "ready http://")
            up.send_signal(number)
            self.assertEqual(up.wait(20), 0)

    def test_a_dead_child_gets_a_successor_on_the_same_address(self):
        up = self.up()
        self.until(up, "ready http://")
        http, conductor = self.cluster()["http"], self.cluster()["conductor"]
        for name in ("gateway", "conductor", "decode"):
            old = children_of(up.pid)[f"antiphon-{name}"]
            os.kill(old, signal.SIGKILL)
            self.assertIn("killed by signal 9", self.until(up, "its successor starts"))
            self.wait_for(lambda: children_of(up.pid).get(f"antiphon-{name}", old) != old, f"a new {name}")
        for address in (http, conductor):
            host, port = address.rsplit(":", 1)

            def reachable():
                with socket.socket() as s:
                    return s.connect_ex((host, int(port))) == 0
            self.wait_for(reachable, address)

    def test_five_deaths_end_it_with_the_last_lines(self):
        up = self.up(fault="decode:die")
        out = up.communicate(timeout=60)[0]
        self.assertEqual(up.returncode, 1, out)
        self.assertEqual(out.count("its successor starts"), 4, out)
        self.assertIn("the last lines of decode-0:", out)
        self.assertIn("last words", out)
        self.assertIn("the 5th time within a minute", out)

    def test_what_trying_again_cannot_mend_ends_it_at_once(self):
        up = self.up(fault="prefill:refuse")
        out = up.communicate(timeout=30)[0]
        self.assertEqual(up.returncode, 65, out)
        self.assertIn("error prefill-0: the model file is cut short at byte 17", out)
        self.assertNotIn("successor", out)

    def test_children_end_with_their_parent(self):
        up = self.up()
        self.until(up, "ready http://")
        pids = list(children_of(up.pid).values())
        self.assertEqual(len(pids), 5)
        up.kill()
        up.wait()
        self.wait_for(lambda: not any(os.path.exists(f"/proc/{p}/exe") and os.readlink(f"/proc/{p}/exe") for p in pids if self.alive(p)),
                      "the children's end")

    @staticmethod
    def alive(pid):
        try:
            return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    def test_a_name_is_used_once(self):
        up = self.up()
        self.until(up, "ready http://")
        other = self.up()
        out = other.communicate(timeout=20)[0]
        self.assertEqual(other.returncode, 69, out)
        self.assertIn("a cluster named t runs already", out)
        self.until(self.up(name="u"), "ready http://")

    def test_shows_warnings_and_access_lines_and_keeps_the_rest(self):
        up = self.up(fault="kvstore:log")
        # What a daemon logs reaches the terminal by another way than "ready" does.
        self.until(up, "warning kvstore: the disk is slow", "kvstore: r-7 access status=200", "ready http://")
        self.assertIn("quiet as a mouse", pathlib.Path(f"{self.temp}/state/antiphon/t/kvstore.log").read_text())
        up.send_signal(signal.SIGTERM)
        self.assertNotIn("quiet as a mouse", up.communicate(timeout=20)[0])

    def run_tool(self, *args):
        done = subprocess.run([self.bin / "antiphon", *args], env=self.env, text=True, capture_output=True, timeout=30)
        return done.returncode, done.stdout + done.stderr

    def test_wrong_first_steps_get_a_sentence(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            code, out = self.run_tool("up", "--model", self.model, "--listen", f"127.0.0.1:{port}")
            self.assertEqual(code, 69)
            self.assertIn(f"port {port} on 127.0.0.1 is taken", out)
            self.assertIn("--listen 127.0.0.1:", out)
        steps = [
            (["up"], 78, "scripts/quickstart fetches it"),
            (["up", "--model", f"{self.temp}/nowhere.gguf"], 78, "no such model: "),
            (["up", "--model", __file__], 78, "not a GGUF"),
            (["up", "--model", self.temp], 78, "tiny.gguf: name that file"),
            (["up", "--model", self.model, "--kvstore.pool=9TiB"], 69, "too little memory"),
            (["up", "--model", self.model, "--listen", "nowhere.invalid:80", "--gateway.auth.mode=none"], 69, "no such host"),
            (["up", "--model", self.model, "--listen", "0.0.0.0:0"], 78, "gateway.auth.keys_file"),
            (["up", "--model", self.model, "--api-key-file", "/nowhere"], 78, "no such key file: /nowhere"),
            (["up", "--prefill", "0"], 78, "--prefill must be a whole number"),
            (["up", "--modle", "x"], 64, "did you mean --model?"),
            (["up", "--worker.thread=1"], 78, "did you mean worker.threads?"),
            (["up", "--name", "../x"], 78, "is no name"),
            (["up", "--cluster.name=x"], 64, "--name"),
            (["pu"], 64, "did you mean up?"),
            ([], 64, "usage: antiphon COMMAND"),
            (["status"], 69, "no cluster runs here"),
            (["status", "--target", "127.0.0.1:1"], 69, "cannot be reached"),
            (["status", "-o", "xml"], 64, "-o must be text or json"),
            (["chat", "--target", "127.0.0.1:1", "hi"], 69, "cannot reach 127.0.0.1:1"),
            (["model", "inspect", "/nowhere"], 78, "/nowhere"),
            (["model", "render", "--messages", "x"], 64, "--model or --template"),
            (["config", "check", "--log.level=loud"], 78, "none of debug, info"),
        ]
        for arguments, code, text in steps:
            with self.subTest(arguments=arguments):
                got, out = self.run_tool(*arguments)
                self.assertEqual(got, code, out)
                self.assertIn(text, out)

    def test_a_missing_program_is_named(self):
        os.remove(self.bin / "antiphon-kvstore")
        code, out = self.run_tool("up", "--model", self.model, "--listen", "127.0.0.1:0")
        self.assertEqual(code, 69)
        self.assertIn("antiphon-kvstore", out)

    def test_version_and_help(self):
        self.assertRegex(self.run_tool("version")[1], r"^antiphon \d+\.\d+\.\d+\n$")
        for command in ([], ["up"], ["chat"], ["status"], ["model"], ["config"]):
            code, out = self.run_tool(*command, "--help")
            self.assertEqual(code, 0)
            self.assertIn("usage: antiphon", out)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
