"""The other commands of `antiphon` against a cluster that runs, and on the real model's file."""
import json
import os
import subprocess
import sys

from cluster import BIN, Cluster, model_path


def run(cluster, *args, code=0, **options):
    done = cluster.run_cli(*args, **options)
    assert done.returncode == code, (args, done.returncode, done.stdout, done.stderr)
    return done.stdout


def tool(*args, stdin=""):
    return subprocess.run([BIN / "antiphon", *args], input=stdin, text=True, capture_output=True, timeout=60, check=True).stdout


def main():
    model = model_path()
    with Cluster() as cluster:
        question = "What is the capital of France? Answer in one sentence."
        assert "Paris" in run(cluster, "chat", question, "--temperature", "0")
        answers = run(cluster, "chat", "--temperature", "0", input=f"{question}\n/reset\nName a fruit.\n/exit\n")
        assert "Paris" in answers and "anana" in answers, answers
        cut = cluster.run_cli("chat", "Tell a very long story.", "--max-tokens", "5")
        assert cut.returncode == 0 and "cut: --max-tokens is 5" in cut.stderr, cut
        run(cluster, "chat", "hi", "--max-tokens", "0", code=64)
        status = json.loads(run(cluster, "status", "-o", "json"))
        assert status, status
        text = run(cluster, "status")
        for node in ("prefill-0", "decode-0", "kvstore"):
            assert node in text, text
        cluster.kill9("decode")
        degraded = cluster.run_cli("status")
        assert degraded.returncode in (0, 1, 2), degraded
        assert cluster.run_cli("status", "--target", "nobody").returncode == 69
    assert tool("model", "inspect", model).rstrip().endswith("servable: yes")
    text = "The sea, the sea!"
    ids = tool("model", "tokenize", "--model", model, stdin=text).split()
    assert len(ids) > 3 and all(i.isdigit() for i in ids), ids
    messages = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"messages-{os.getpid()}.json")
    with open(messages, "w") as out:
        json.dump({"messages": [{"role": "user", "content": text}], "add_generation_prompt": True}, out)
    try:
        rendered = tool("model", "render", "--model", model, "--messages", messages)
    finally:
        os.remove(messages)
    assert text in rendered and rendered.endswith("<|im_start|>assistant\n"), rendered
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
