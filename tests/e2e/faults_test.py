"""kill -9 of each daemon in the middle of a request: a correct answer after re-placement or one clear
error event, never a hang; nothing leaks; the cluster serves on."""
import os
import re
import signal
import sys
import threading
import time

from cluster import Cluster, HttpError

PROMPT = "Once upon a time, in a village by the sea, there lived a fisherman who"
BODY = {"prompt": PROMPT, "max_tokens": 160, "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
HANG_S = 30


def text_of(events):
    return "".join(c["text"] for e in events if isinstance(e, dict) for c in e.get("choices", []))


def errors_of(events):
    return [e["error"] for e in events if isinstance(e, dict) and "error" in e]


def ask(cluster, on_event=None, timeout=HANG_S):
    return cluster.stream("/v1/completions", BODY, timeout=timeout, on_event=on_event)


def ask_until_served(cluster, reference, seconds=40):
    """The cluster serves on: within `seconds` an answer equals the reference."""
    deadline = time.time() + seconds
    last = None
    while time.time() < deadline:
        try:
            events = ask(cluster)
            if not errors_of(events):
                assert text_of(events) == reference, (text_of(events), reference)
                return
            last = errors_of(events)
        except (HttpError, OSError) as e:
            last = e
        time.sleep(0.2)
    raise AssertionError(f"not served again within {seconds} s: {last}")


def leaks(cluster):
    """Sum of pins and reservations over the stores, from their metrics; None while one is away."""
    import urllib.request
    total = 0.0
    for node in cluster.runtime_file()["children"]:
        if node["daemon"] != "kvstore":
            continue
        try:
            with urllib.request.urlopen(f"http://{node['ops']}/metrics", timeout=2) as response:
                page = response.read().decode()
        except OSError:
            return None
        found = re.findall(r"^antiphon_kv_leases\{.*\} ([0-9.e+]+)$", page, re.M)
        assert found, "antiphon_kv_leases is missing"
        total += sum(float(v) for v in found)
    return total


def expect_no_leaks(cluster, seconds=10):
    deadline = time.time() + seconds
    value = None
    while time.time() < deadline:
        value = leaks(cluster)
        if value == 0:
            return
        time.sleep(0.1)
    raise AssertionError(f"antiphon_kv_leases is {value} with nothing running")


def kill_during(cluster, victim, at_event, reference, must_answer):
    """Kills antiphon-VICTIM when `at_event` events have come; checks what the client saw."""
    killed = threading.Event()

    def on_event(count):
        if count == at_event and not killed.is_set():
            killed.set()
            cluster.kill9(victim)

    start = time.time()
    events = ask(cluster, on_event)
    took = time.time() - start
    assert killed.is_set(), "the answer ended before the kill"
    errors = errors_of(events)
    assert events[-1] == "[DONE]", events[-3:]
    if errors:
        assert not must_answer, f"{victim}: {errors}"
        assert len(errors) == 1 and errors[0]["message"], errors
        assert reference.startswith(text_of(events)), "tokens before the error differ"
        outcome = f"one error event: {errors[0]['message']}"
    else:
        assert text_of(events) == reference, f"{victim}: tokens differ after the kill"
        usage = [e["usage"] for e in events if isinstance(e, dict) and e.get("usage")]
        assert usage and usage[-1]["completion_tokens"] == BODY["max_tokens"], usage
        outcome = "same tokens"
    print(f"kill -9 {victim} at event {at_event}: {outcome}, {took:.1f} s", flush=True)


def kill_before_first_token(cluster, victim, reference):
    """Kills while a long prompt is being prefilled: an answer or a clear status, never a hang."""
    body = {"prompt": "The history of the sea. " * 300, "max_tokens": 4, "temperature": 0}
    answer = {}

    def client():
        try:
            answer["events"] = cluster.stream("/v1/completions", body, timeout=HANG_S)
        except HttpError as e:
            answer["status"] = e.status
        except OSError as e:
            answer["broken"] = e

    thread = threading.Thread(target=client)
    thread.start()
    time.sleep(0.15)
    cluster.kill9(victim)
    thread.join(HANG_S + 5)
    assert not thread.is_alive() and "broken" not in answer, (victim, answer)
    if "status" in answer:
        assert answer["status"] in (429, 500, 502, 503, 504), answer
    else:
        assert answer["events"][-1] == "[DONE]" and len(errors_of(answer["events"])) <= 1, answer
    print(f"kill -9 {victim} during prefill: {answer.get('status', 'answered')}", flush=True)


def stop_during(cluster, victim, reference):
    """SIGSTOP: a process that is there and answers nothing. Others take over; when it wakes up its late words
    change nothing."""
    stopped = []

    def on_event(count):
        if count == 20 and not stopped:
            stopped.append(cluster.children(victim)[0])
            os.kill(stopped[0], signal.SIGSTOP)

    start = time.time()
    try:
        events = ask(cluster, on_event, timeout=60)
        assert stopped and not errors_of(events), errors_of(events)
        assert text_of(events) == reference, f"{victim}: tokens differ"
        assert text_of(ask(cluster, timeout=60)) == reference, f"{victim}: the next request's tokens differ"
    finally:
        os.kill(stopped[0], signal.SIGCONT)
    print(f"SIGSTOP {victim}: same tokens, two requests in {time.time() - start:.1f} s", flush=True)


def main():
    with Cluster(prefill=1, decode=1) as cluster:
        reference = text_of(ask(cluster))
        assert len(reference) > 100, reference
        expect_no_leaks(cluster)
        for victim in ("conductor", "prefill", "decode", "kvstore"):
            kill_during(cluster, victim, 20, reference, must_answer=victim in ("conductor", "prefill"))
            ask_until_served(cluster, reference)
            expect_no_leaks(cluster)
        for victim in ("prefill", "decode", "kvstore"):
            kill_before_first_token(cluster, victim, reference)
            ask_until_served(cluster, reference)
            expect_no_leaks(cluster)
    with Cluster(prefill=2, decode=2) as cluster:
        reference2 = text_of(ask(cluster))
        assert reference2 == reference, "2P2D differs from 1P1D"
        # Both decode workers in turn, so that the one that runs the stream is among them.
        for index in (0, 1):
            pid_count = len(cluster.children("decode"))
            assert pid_count == 2, pid_count
            kill_during(cluster, "decode", 20, reference, must_answer=True)
            ask_until_served(cluster, reference)
            expect_no_leaks(cluster)
            deadline = time.time() + 20
            while len(cluster.children("decode")) < 2 and time.time() < deadline:
                time.sleep(0.1)
        for victim in ("prefill", "decode"):
            stop_during(cluster, victim, reference)
            ask_until_served(cluster, reference)
            expect_no_leaks(cluster)
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
