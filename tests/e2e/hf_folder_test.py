"""A Hugging Face folder is served wherever a GGUF is: the same ids as Hugging Face's tokenizer, the same prompt, and the same
text as the GGUF with the same weights.

    hf_folder_test.py TOKENIZE
"""
import json
import pathlib
import random
import subprocess
import sys
import tempfile

from cluster import BIN, SKIP, Cluster, model_path

try:
    import tokenizers

    import hf_folder
    import tokenizer_vs_hf
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(SKIP)

CHAT = {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "temperature": 0, "max_tokens": 40}
TEXT = {"prompt": "The sea, the sea! In winter", "temperature": 0, "max_tokens": 40, "logprobs": 3}


def antiphon(*args, stdin=""):
    return subprocess.run([BIN / "antiphon", *args], input=stdin, text=True, capture_output=True, timeout=60)


def check_ids(program, folder, file):
    """Ours of the folder, ours of the GGUF, and Hugging Face's of the folder."""
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    added = [token.content for token in theirs.get_added_tokens_decoder().values()]
    rng = random.Random("folder")
    texts = [tokenizer_vs_hf.random_text(rng, added) for _ in range(500)] + tokenizer_vs_hf.PHRASES
    of_folder, of_file = (tokenizer_vs_hf.ours(program, str(path), texts) for path in (folder, file))
    assert of_folder == of_file
    for text, mine in zip(texts, of_folder):
        want = tokenizer_vs_hf.as_line(theirs.encode(text, add_special_tokens=False).ids)
        assert mine.strip() == want, tokenizer_vs_hf.first_difference(text, mine, want)


def check_tools(folder, file, temp):
    inspected = antiphon("model", "inspect", str(folder))
    assert inspected.returncode == 0 and inspected.stdout.rstrip().endswith("servable: yes"), inspected
    assert "Hugging Face folder with 2 safetensors files" in inspected.stdout, inspected.stdout
    messages = pathlib.Path(temp, "messages.json")
    messages.write_text(json.dumps({**CHAT, "add_generation_prompt": True}))
    prompts = [antiphon("model", "render", "--model", str(path), "--messages", str(messages)).stdout for path in (folder, file)]
    assert prompts[0] == prompts[1] and prompts[0].endswith("<|im_start|>assistant\n"), prompts
    ids = [antiphon("model", "tokenize", "--model", str(path), stdin=TEXT["prompt"]).stdout for path in (folder, file)]
    assert ids[0] == ids[1] and len(ids[0].split()) > 5, ids
    one = antiphon("model", "inspect", str(folder / "model-00001-of-00002.safetensors"))
    assert one.returncode != 0 and "name the folder" in one.stderr, one


def answers(path):
    with Cluster(model=str(path)) as cluster:
        name = json.loads(cluster.get("/v1/models"))["data"][0]["id"]
        chat = cluster.post("/v1/chat/completions", {**CHAT, "model": name})["choices"][0]
        text = cluster.post("/v1/completions", {**TEXT, "model": name})["choices"][0]
        return name, (chat["message"]["content"], text["text"], text["logprobs"])


def main():
    model = model_path()
    with tempfile.TemporaryDirectory(prefix="antiphon-hf-") as temp:
        folder, file = pathlib.Path(temp, "SmolLM2-0.1B"), pathlib.Path(temp, "same.gguf")
        hf_folder.make(model, folder, str(file))
        check_ids(sys.argv[1], folder, file)
        check_tools(folder, file, temp)
        name, of_folder = answers(folder)
        assert name == "SmolLM2-0.1B", name
        _, of_file = answers(file)
        assert of_folder == of_file, (of_folder, of_file)
        assert "sunlight" in of_folder[0] or "blue" in of_folder[0], of_folder
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
