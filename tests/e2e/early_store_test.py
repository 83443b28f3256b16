"""A store is there for as long as it likes before any worker is: large models take minutes to load. The conductor does not
count it as lost meanwhile, and serves as soon as workers have come."""
import pathlib
import re
import socket
import subprocess
import tempfile
import time

from cluster import BIN

ALONE_S = 4.5  # more than a node may be silent


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main():
    with tempfile.TemporaryDirectory(prefix="antiphon-early-") as temp:
        port = free_port()
        logs, processes = {}, []
        try:
            for daemon, args in (("conductor", [f"--conductor.rpc.listen=127.0.0.1:{port}", "--conductor.ops.listen=127.0.0.1:0"]),
                                 ("kvstore", ["--kvstore.rpc.listen=127.0.0.1:0", "--kvstore.data.listen=127.0.0.1:0",
                                              "--kvstore.ops.listen=127.0.0.1:0", "--kvstore.pool=64MiB"])):
                logs[daemon] = pathlib.Path(temp, daemon + ".log")
                processes.append(subprocess.Popen(
                    [BIN / f"antiphon-{daemon}", "--cluster.name=early", f"--cluster.conductors=127.0.0.1:{port}",
                     f"--cluster.runtime_dir={temp}/run", *args],
                    stdout=logs[daemon].open("w"), stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL))
            deadline = time.monotonic() + 20
            while "registered with conductor" not in logs["kvstore"].read_text():
                assert time.monotonic() < deadline and all(p.poll() is None for p in processes), {
                    name: log.read_text() for name, log in logs.items()}
                time.sleep(0.05)
            time.sleep(ALONE_S)
            said = logs["conductor"].read_text()
            assert not re.search(r"is lost", said), said
        finally:
            for process in processes:
                process.kill()
                process.wait()
    print("ok")


if __name__ == "__main__":
    main()
