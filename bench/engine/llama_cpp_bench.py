"""Times llama.cpp on one case and prints what engine_bench.cc prints for it; run by compare.

    llama_cpp_bench.py MODEL THREADS prompt LENGTH
    llama_cpp_bench.py MODEL THREADS generate STREAMS
    llama_cpp_bench.py MODEL THREADS context LENGTH
    llama_cpp_bench.py --q4_0 MODEL OUT     requantises MODEL as Q4_0

Calls llama_decode itself, so that neither tokens nor sampling pass through the Python wrapper: what is
beside it in a timed section is one argmax a row. before_load_bytes is what Python and the libraries take.
"""
import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np

from resident import resident_bytes

CONTEXT = 128  # tokens before the first generated one
GENERATED = 64
CHUNK = 512


def prompt_token(vocab, i):
    return i * 7919 % (vocab - 64) + 64  # as in engine_bench.cc


class Engine:
    def __init__(self, path, threads, streams, tokens, cache=llama_cpp.GGML_TYPE_F16):
        llama_cpp.llama_backend_init()
        started = time.perf_counter()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = streams * tokens
        params.n_seq_max = streams
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = cache
        # Streams apart: with one pool of cells for all, 16 streams are slower (175 for 210 tokens/s).
        params.kv_unified = False
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit("llama.cpp cannot make a context")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)
        self.prompt(0, 1)
        self.load_s = time.perf_counter() - started
        self.clear()

    def clear(self):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, rows):
        """rows: (token, position, stream, wants logits)"""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, stream, logits) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = stream
            batch.logits[i] = logits
        if llama_cpp.llama_decode(self.context, batch) != 0:
            sys.exit("llama_decode failed")

    def best(self, index):
        logits = llama_cpp.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())

    def prompt(self, stream, length, offset=0):
        last = 0
        for start in range(0, length, CHUNK):
            end = min(start + CHUNK, length)
            self.decode([(prompt_token(self.vocab, i + offset), i, stream, i + 1 == length) for i in range(start, end)])
            last = end - start - 1
        return self.best(last)


@llama_cpp.llama_log_callback
def QUIET(level, text, data):
    if level >= 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


def time_prompt(path, threads, length):
    engine = Engine(path, threads, 1, length)
    engine.prompt(0, min(length, CHUNK))
    engine.clear()
    started = time.perf_counter()
    engine.prompt(0, length)
    return length / (time.perf_counter() - started), engine.load_s


def time_generate(path, threads, streams, context=CONTEXT):
    engine = Engine(path, threads, streams, context + GENERATED)
    tokens = [engine.prompt(stream, context, 1000 * stream) for stream in range(streams)]
    started = time.perf_counter()
    for step in range(GENERATED):
        engine.decode([(token, context + step, stream, True) for stream, token in enumerate(tokens)])
        tokens = [engine.best(stream) for stream in range(streams)]
    return streams * GENERATED / (time.perf_counter() - started), engine.load_s


def time_context(path, threads, length):
    return time_generate(path, threads, 1, length)


def requantise(path, out):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(path.encode(), out.encode(), params) != 0:
        sys.exit(f"llama.cpp cannot requantise {path}")


def main():
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p())
    if sys.argv[1] == "--q4_0":
        requantise(*sys.argv[2:])
        return
    path, threads, case, size = sys.argv[1:]
    measure = {"prompt": time_prompt, "generate": time_generate, "context": time_context}[case]
    before = resident_bytes()
    speed, load_s = measure(path, int(threads), int(size))
    print(json.dumps({"tokens_per_s": speed, "load_s": load_s, "peak_bytes": resident_bytes("VmHWM"),
                      "before_load_bytes": before}))


if __name__ == "__main__":
    main()
