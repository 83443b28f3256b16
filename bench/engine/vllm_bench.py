"""Times vLLM's CPU engine; run by compare in vLLM's own environment.

    vllm_bench.py FOLDER THREADS      cases on stdin, a line each; answers on stdout
    vllm_bench.py --folder GGUF OUT   makes the Hugging Face folder, bf16, that vLLM reads

A start takes a minute or more, so one process stays for all the cases of a round. It is asked and answers
as engine_bench.cc does ("prompt 128"), but "peak_bytes" is then the peak of all cases so far. Steps are driven
one by one, so that a prompt and the tokens after it are timed apart; no request passes through HTTP or
a tokenizer.
"""
import json
import os
import sys
import time

from resident import resident_bytes

CONTEXT = 128  # tokens before the first generated one
GENERATED = 64
MAX_LENGTH = 8192
MAX_STREAMS = 16


def make_folder(gguf, out):
    import pathlib

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    gguf = pathlib.Path(gguf)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from a GGUF refuses to be saved; its weights in a fresh one do not.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


class Engine:
    def __init__(self, folder):
        from vllm import LLM, SamplingParams

        self.before_load_bytes = resident_bytes()
        started = time.perf_counter()
        self.llm = LLM(folder, dtype="bfloat16", max_model_len=MAX_LENGTH, max_num_seqs=MAX_STREAMS,
                       max_num_batched_tokens=4096, enable_prefix_caching=False)
        self.engine = self.llm.llm_engine
        self.params = SamplingParams
        self.vocab = self.llm.model_config.get_vocab_size()
        self.requests = 0
        self.run(1, 1, 1)
        self.load_s = time.perf_counter() - started

    def run(self, length, streams, tokens):
        """Seconds until every stream has its first token, and from then until the last has `tokens`."""
        params = self.params(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        for stream in range(streams):
            prompt = [(i + 1000 * stream) * 7919 % (self.vocab - 64) + 64 for i in range(length)]
            self.requests += 1
            self.engine.add_request(str(self.requests), {"prompt_token_ids": prompt}, params)
        counts = {}
        started = time.perf_counter()
        first = None
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)
            if first is None and len(counts) == streams:
                first = time.perf_counter()
                drawn = sum(counts.values())
        ended = time.perf_counter()
        if sum(counts.values()) != streams * tokens:
            sys.exit(f"{counts} tokens were drawn, {streams} times {tokens} were asked for")
        return first - started, ended - first, streams * tokens - drawn

    def prompt(self, length):
        self.run(length, 1, 1)
        return length / self.run(length, 1, 1)[0]

    def generate(self, streams, context=CONTEXT):
        if context == CONTEXT:
            self.run(context, streams, 2)
        _, seconds, drawn = self.run(context, streams, 1 + GENERATED)
        return drawn / seconds

    def context(self, length):
        return self.generate(1, length)


def serve(folder, threads):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout too
    cores = sorted(os.sched_getaffinity(0))[:int(threads)]
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
                   "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    engine = Engine(folder)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        case, size = line.split()
        speed = {"prompt": engine.prompt, "generate": engine.generate, "context": engine.context}[case](int(size))
        print(json.dumps({"tokens_per_s": speed, "load_s": engine.load_s, "peak_bytes": resident_bytes("VmHWM"),
                          "before_load_bytes": engine.before_load_bytes}), file=answers, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--folder":
        make_folder(*sys.argv[2:])
    else:
        serve(*sys.argv[1:])
