#!/usr/bin/env python3
"""What `transformers` does on the same card at the shape of Llama-3-8B: SDPA, static cache, random
weights in bf16, decode steps compiled with CUDA graphs where that works.

    transformers_bench.py [--json FILE] [--only eager|compiled]      needs torch, transformers, a GPU
"""

import argparse
import json
import time

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache


def make_model():
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8256,
        rms_norm_eps=1e-5, tie_word_embeddings=False, attn_implementation="sdpa")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    return config, model.eval()


def timed(step, warm, runs):
    for _ in range(warm):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    times.sort()
    return times[len(times) // 2]


@torch.inference_mode()
def decode(config, model, forward, rows, context):
    cache = StaticCache(config=config, max_cache_len=context + 64)
    ids = torch.full((rows, 1), 17, device="cuda")
    position = torch.tensor([context], device="cuda")

    def step():
        out = forward(input_ids=ids, past_key_values=cache, cache_position=position,
                      position_ids=position.expand(rows, 1), use_cache=True)
        ids.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
        position.add_(1)

    seconds = timed(step, 5, 20)
    return rows / seconds


@torch.inference_mode()
def prefill(model, tokens):
    ids = torch.randint(0, 128256, (1, tokens), device="cuda")
    seconds = timed(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1), 2, 5)
    return tokens / seconds


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    parser.add_argument("--only", choices=["eager", "compiled"])
    options = parser.parse_args()
    begin = time.time()
    config, model = make_model()
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
              "transformers": transformers.__version__}
    print(result, f"model in {time.time() - begin:.1f} s", flush=True)

    def note(name, value):
        result[name] = value
        print(f"{name}: {value:.0f} tokens/s", flush=True)
        if options.json:
            with open(options.json, "w", encoding="utf-8") as out:
                json.dump(result, out, indent=1)

    if options.only != "compiled":
        for tokens in (2048, 8192):
            note(f"prefill_{tokens}", prefill(model, tokens))
        for rows in (1, 32, 128):
            note(f"decode_{rows}_eager", decode(config, model, model.forward, rows, 1024))
    if options.only == "eager":
        return
    for rows in (1, 128, 32):
        torch._dynamo.reset()
        forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        try:
            note(f"decode_{rows}_compiled", decode(config, model, forward, rows, 1024))
        except Exception as error:  # compiling is best effort: what failed is printed
            print(f"decode_{rows}_compiled: {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    main()
