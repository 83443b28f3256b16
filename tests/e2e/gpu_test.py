"""The cluster on a GPU, by `worker.device: cuda` alone: it serves, a decode worker that dies under four streams costs
none of them a token, and three ranks that share the card serve as well. What comes after the kill is not compared with
an answer without one: steps of other shapes round differently."""
import os
import sys
import threading
import time

import faults_test as faults
from cluster import SKIP, Cluster

DEVICE = "/dev/nvidia0"
STREAMS = 4
TOKENS = 400


def answers(cluster):
    answer = cluster.post("/v1/completions", {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0})
    assert "Paris" in answer["choices"][0]["text"], answer


def serves_on_the_device(cluster, count):
    log = cluster.all_logs()
    assert "serving on the CPU" not in log, log
    assert len(cluster.children("prefill") + cluster.children("decode")) == count


def streams_outlive_a_decode_worker(cluster):
    body = {**faults.BODY, "max_tokens": TOKENS}
    came = [[] for _ in range(STREAMS)]
    middle = threading.Barrier(STREAMS + 1, timeout=60)

    def client(i):
        def on_event(count):
            if count == TOKENS // 10:
                middle.wait()
        came[i] = cluster.stream("/v1/completions", {**body, "prompt": f"{i}. {faults.PROMPT}"}, timeout=60, on_event=on_event)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(STREAMS)]
    for thread in threads:
        thread.start()
    middle.wait()
    start = time.time()
    cluster.kill9("decode")
    for thread in threads:
        thread.join(70)
    for events in came:
        assert events and events[-1] == "[DONE]", events[-3:]
        assert not faults.errors_of(events), faults.errors_of(events)
        usage = [e["usage"] for e in events if isinstance(e, dict) and e.get("usage")]
        assert usage and usage[-1]["completion_tokens"] == TOKENS, usage
    print(f"kill -9 of a decode worker under {STREAMS} streams: all whole, {time.time() - start:.1f} s", flush=True)


def main():
    if not os.path.exists(DEVICE):
        print(f"skipped: no {DEVICE}")
        return SKIP
    with Cluster(prefill=1, decode=2, args=["--worker.device=cuda"]) as cluster:
        answers(cluster)
        serves_on_the_device(cluster, 3)
        streams_outlive_a_decode_worker(cluster)
        faults.expect_no_leaks(cluster)
        answers(cluster)
    with Cluster(prefill=1, decode=1, ready_timeout=180, args=["--worker.device=cuda", "--worker.tensor_parallel=3"]) as cluster:
        answers(cluster)
        serves_on_the_device(cluster, 2)
        faults.expect_no_leaks(cluster)
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
