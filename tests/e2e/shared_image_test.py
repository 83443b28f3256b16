"""Workers of one host share one packed image through the store: a restarted worker packs, hashes and measures nothing
and is ready at once; a store that is restarted gets the image back; all daemons together hold it once."""
import datetime
import json
import pathlib
import re
import sys
import time
import urllib.request

from cluster import Cluster, children_of

SHARED = "packed weights were shared by another worker"
STARTS = " starts, cluster "
READY_S = 5  # on a machine that builds beside it; 50 ms else
LEAN = 1.1
GATEWAY_MIB = 10  # of its own: the tokenizer's 7, and twice that before what reading it takes has gone back
BODY = {"prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}


def log_of(cluster, name):
    return next(pathlib.Path(cluster.temp.name + "/state").rglob(f"{name}.log")).read_text(errors="replace")


def last_life(cluster, name):
    """The log's lines since the process was last started."""
    lines = log_of(cluster, name).splitlines()
    start = max(i for i, line in enumerate(lines) if STARTS in line)
    return lines[start:]


def seconds_of(line):
    return datetime.datetime.fromisoformat(line.split()[0].replace("Z", "+00:00")).timestamp()


def wait_until(good, what, seconds=60):
    deadline = time.time() + seconds
    while not good():
        assert time.time() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def answer(cluster, seconds=60):
    """Of a cluster that may still be coming back."""
    deadline = time.time() + seconds
    while True:
        status, _, data = cluster.request("POST", "/v1/completions", BODY)
        if status == 200:
            return json.loads(data)["choices"][0]["text"]
        assert time.time() < deadline, data
        time.sleep(0.1)


def restart(cluster, name):
    """kill -9; the new process's log once it is ready."""
    lives = log_of(cluster, name).count(STARTS)
    cluster.kill9(name.split("-")[0])
    wait_until(lambda: log_of(cluster, name).count(STARTS) > lives and
               any(line.endswith(" - ready") for line in last_life(cluster, name)), f"{name} is ready again")
    lines = last_life(cluster, name)
    ready = next(line for line in lines if line.endswith(" - ready"))
    return "\n".join(lines), seconds_of(ready) - seconds_of(lines[0])


def memory_of(pid):
    """MiB of smaps_rollup by name."""
    fields = re.findall(r"^(\w+): +(\d+) kB$", pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    return {name: int(kib) / 1024 for name, kib in fields}


def blob_mib(cluster):
    ops = next(child["ops"] for child in cluster.runtime_file()["children"] if child["daemon"] == "kvstore")
    with urllib.request.urlopen(f"http://{ops}/metrics", timeout=5) as response:
        page = response.read().decode()
    return float(re.search(r"^antiphon_kvstore_blob_bytes\{[^}]*\} (\S+)$", page, re.M).group(1)) / (1 << 20)


def main():
    with Cluster(prefill=1, decode=1) as cluster:
        reference = answer(cluster)
        for name in ("prefill-0", "decode-0"):
            wait_until(lambda: any(line.endswith(" - ready") for line in last_life(cluster, name)), f"{name} is ready")
        logs = [log_of(cluster, name) for name in ("prefill-0", "decode-0")]
        assert sorted(SHARED in log for log in logs) == [False, True], "one packs, the other does not"
        image = blob_mib(cluster)

        # What starting has left goes back to the system soon.
        rows = {}

        def lean():
            rows.update({command.split()[0].split("/")[-1]: memory_of(pid) for pid, command in children_of(cluster.process.pid).items()})
            total = sum(row["Pss"] for row in rows.values())
            return total < LEAN * (image + 512) and rows["antiphon-gateway"]["Pss_Anon"] < GATEWAY_MIB

        try:
            wait_until(lean, f"all daemons hold less than {LEAN} times image and pool, the gateway {GATEWAY_MIB} MiB", 30)
        finally:
            for name, row in rows.items():
                print(f"{name}: Pss {row['Pss']:.0f} MiB: anonymous {row['Pss_Anon']:.0f}, files {row['Pss_File']:.0f}, "
                      f"shared memory {row['Pss_Shmem']:.0f}", flush=True)
            shared = sum(row["Pss_Shmem"] for row in rows.values())
            print(f"all daemons: {sum(row['Pss'] for row in rows.values()):.0f} MiB, of which shared memory {shared:.0f}; "
                  f"image {image:.0f} + pool 512", flush=True)
        assert shared < 1.1 * (image + 512), rows
        assert all(row["Pss_Anon"] < image for row in rows.values()), "somebody has an image of his own"

        for name in ("decode-0", "prefill-0", "decode-0"):
            log, seconds = restart(cluster, name)
            assert SHARED in log, log
            assert seconds < READY_S, f"{name} took {seconds:.2f} s"
            assert answer(cluster) == reference
            print(f"{name} ready {seconds * 1000:.0f} ms after its start", flush=True)

        # A new store knows nothing; the workers bring it what they have.
        restart(cluster, "kvstore")
        wait_until(lambda: blob_mib(cluster) > image - 1, "the store has the image again")
        log, seconds = restart(cluster, "decode-0")
        assert SHARED in log, log
        assert seconds < READY_S, f"{seconds:.2f} s"
        assert answer(cluster) == reference
        print(f"after the store's restart: decode-0 ready {seconds * 1000:.0f} ms after its start", flush=True)
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
