"""Workers of three processes each (worker.tensor_parallel: 3; the small model has nine heads and three KV heads):
they serve; a rank that dies takes its worker with it and no stream hangs; ranks end with their leader."""
import os
import pathlib
import signal
import subprocess
import sys
import time

import faults_test as faults
from cluster import BIN, Cluster, children_of, model_path

RANKS = 3
faults.BODY["max_tokens"] = 80
faults.HANG_S = 60


def ranks_of(leader):
    return sorted(pid for pid, command in children_of(leader).items() if " --tensor-rank " in command)


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(good, what, seconds=30):
    deadline = time.time() + seconds
    while not good():
        assert time.time() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def workers(cluster):
    return cluster.children("prefill") + cluster.children("decode")


def whole(cluster, count):
    return len(workers(cluster)) == count and all(len(ranks_of(w)) == RANKS - 1 for w in workers(cluster))


def kill_rank_during(cluster, victim, index, reference):
    """kill -9 of a rank in the middle of a stream: the same tokens from another worker or one clear error."""
    leader = cluster.children(victim)[index]
    ranks = ranks_of(leader)
    assert len(ranks) == RANKS - 1, ranks
    killed = []

    def on_event(count):
        if count == 15 and not killed:
            killed.append(ranks[0])
            os.kill(ranks[0], signal.SIGKILL)

    start = time.time()
    events = faults.ask(cluster, on_event)
    assert killed, "the answer ended before the kill"
    assert events[-1] == "[DONE]", events[-3:]
    errors = faults.errors_of(events)
    if errors:
        assert len(errors) == 1 and errors[0]["message"], errors
        assert reference.startswith(faults.text_of(events)), "tokens before the error differ"
    else:
        assert faults.text_of(events) == reference, "tokens differ after the kill"
    wait_until(lambda: not alive(leader), f"the leader {leader} of a dead rank has left")
    wait_until(lambda: not any(alive(rank) for rank in ranks), "its other rank too")
    print(f"kill -9 of a rank of {victim} {index}: {errors[0]['message'] if errors else 'same tokens'}, "
          f"{time.time() - start:.1f} s", flush=True)


def refuses_what_does_not_divide():
    """Exit 65 and a line that names the field, before anything is loaded."""
    env = dict(os.environ, XDG_RUNTIME_DIR="/nonexistent")
    run = subprocess.run([str(BIN / "antiphon-decode"), f"--models=[{{path: {model_path()}}}]", "--worker.tensor_parallel=2",
                          "--worker.decode.listen=127.0.0.1:0", "--worker.decode_ops.listen=127.0.0.1:0"],
                         capture_output=True, text=True, timeout=60, env=env)
    assert run.returncode == 65, (run.returncode, run.stderr)
    assert "tensor_parallel 2 does not divide the model's attention.head_count, 9" in run.stderr, run.stderr


def main():
    refuses_what_does_not_divide()
    with Cluster(prefill=1, decode=2, ready_timeout=180,
                 args=[f"--worker.tensor_parallel={RANKS}", "--worker.threads=1"]) as cluster:
        assert whole(cluster, 3), [ranks_of(w) for w in workers(cluster)]
        answer = cluster.post("/v1/completions", {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0})
        assert "Paris" in answer["choices"][0]["text"], answer
        start = time.time()
        reference = faults.text_of(faults.ask(cluster))
        print(f"{faults.BODY['max_tokens']} tokens in {time.time() - start:.1f} s: {reference!r}", flush=True)
        assert len(reference) > 100, reference
        faults.expect_no_leaks(cluster)
        # Both decode workers in turn, so that the one that runs the stream is among them.
        for victim, index in (("decode", 0), ("decode", 1), ("prefill", 0)):
            kill_rank_during(cluster, victim, index, reference)
            faults.ask_until_served(cluster, reference, seconds=90)
            faults.expect_no_leaks(cluster)
            wait_until(lambda: whole(cluster, 3), "the worker is started again", 90)
        # kill -9 of a leader: nothing of it stays behind.
        leader = cluster.children("decode")[0]
        ranks = ranks_of(leader)
        os.kill(leader, signal.SIGKILL)
        wait_until(lambda: not any(alive(rank) for rank in ranks), "the ranks of a killed leader end", 5)
        faults.ask_until_served(cluster, reference, seconds=90)
        wait_until(lambda: whole(cluster, 3), "the worker is started again", 90)
        everybody = workers(cluster) + [rank for w in workers(cluster) for rank in ranks_of(w)]
    wait_until(lambda: not any(alive(pid) for pid in everybody), "all processes end with their cluster", 5)
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
