#!/usr/bin/env python3
"""Makes tests/engine/smollm2_q4_1.golden from golden_text.md, and measures llama.cpp against it.

The reference is `transformers` in float32 on the dequantised weights of the GGUF file, teacher-forced
over the first 2,048 tokens. The file keeps the 64 best log-probabilities of each position and the
logarithm of the mass of the rest, little-endian:

    "AGOLDEN1"  u32 tokens  u32 top  u32 vocabulary
    u32 id[tokens]
    for each position: u16 id[top]  f32 logprob[top] (best first)  f32 log of the tail's mass

    make_goldens.py MODEL.gguf OUT             needs torch 2.15, transformers 5.24, gguf, accelerate
    make_goldens.py --llama-cpp MODEL.gguf GOLDEN        needs llama-cpp-python 0.3.36
"""

import argparse
import pathlib
import struct

import numpy as np

TOKENS = 2048
TOP = 64
MAGIC = b"AGOLDEN1"
TEXT = pathlib.Path(__file__).with_name("golden_text.md")


def write(model_path, out_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_path = pathlib.Path(model_path)
    tokenizer = AutoTokenizer.from_pretrained(model_path.parent, gguf_file=model_path.name)
    model = AutoModelForCausalLM.from_pretrained(
        model_path.parent, gguf_file=model_path.name, dtype=torch.float32)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"][:TOKENS]
    assert len(ids) == TOKENS, len(ids)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].to(torch.float64)
    logprobs = torch.log_softmax(logits, dim=-1).numpy()
    vocab = logprobs.shape[1]
    assert vocab <= 65536
    with open(out_path, "wb") as out:
        out.write(MAGIC + struct.pack("<3I", TOKENS, TOP, vocab))
        out.write(np.asarray(ids, dtype="<u4").tobytes())
        for row in logprobs:
            best = np.argsort(-row, kind="stable")[:TOP]
            tail = np.log(max(-np.expm1(np.log(np.exp(row[best]).sum())), 1e-30))
            out.write(best.astype("<u2").tobytes() + row[best].astype("<f4").tobytes())
            out.write(struct.pack("<f", tail))


def read(path):
    data = pathlib.Path(path).read_bytes()
    assert data[:8] == MAGIC
    tokens, top, vocab = struct.unpack_from("<3I", data, 8)
    ids = np.frombuffer(data, "<u4", tokens, 20)
    record = np.dtype([("id", "<u2", top), ("logprob", "<f4", top), ("tail", "<f4")])
    return ids, vocab, np.frombuffer(data, record, tokens, 20 + 4 * tokens)


def compare(records, logits):
    """Top-1 agreement, the same where the two best are more than 0.1 nat apart, mean KL, its 99th
    percentile. The tail counts as one token."""
    agree, clear, kls = [], [], []
    for record, row in zip(records, logits):
        row = row.astype(np.float64)
        row = row - (row.max() + np.log(np.exp(row - row.max()).sum()))
        p = record["logprob"].astype(np.float64)
        q = row[record["id"]]
        q_tail = np.log(max(1 - np.exp(q).sum(), 1e-30))
        tail = float(record["tail"])
        kls.append((np.exp(p) * (p - q)).sum() + np.exp(tail) * (tail - q_tail))
        agree.append(row.argmax() == record["id"][0])
        clear.append(p[0] - p[1] > 0.1)
    agree, clear, kls = map(np.array, (agree, clear, kls))
    return agree.mean(), agree[clear].mean(), kls.mean(), np.percentile(kls, 99)


def measure_llama_cpp(model_path, golden_path):
    import llama_cpp

    ids, vocab, records = read(golden_path)
    llama = llama_cpp.Llama(model_path, n_ctx=TOKENS, n_batch=512, logits_all=True, verbose=False)
    llama.eval([int(i) for i in ids])
    logits = np.asarray(llama.scores[:TOKENS, :vocab])
    print("top-1 %.4f, clear %.4f, mean KL %.3e, p99 %.3e" % compare(records, logits))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", action="store_true")
    parser.add_argument("model")
    parser.add_argument("golden")
    args = parser.parse_args()
    if args.llama_cpp:
        measure_llama_cpp(args.model, args.golden)
    else:
        write(args.model, args.golden)


if __name__ == "__main__":
    main()
