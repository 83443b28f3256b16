"""llama.cpp's logits and quantised files; run by accuracy.

    llama_cpp_logits.py quantise MODEL FORMAT OUT                  every matrix as FORMAT
    llama_cpp_logits.py logits MODEL THREADS TOKENS OUT [CACHE]    float32 [tokens][vocabulary]

TOKENS is a file of ids, one a line; CACHE the type of its keys and values: f16, bf16 or f32.

Logits are computed in batches of 512 tokens, with llama.cpp's own defaults for the rest.
"""
import ctypes
import pathlib
import sys

import llama_cpp
import numpy as np

from llama_cpp_bench import CHUNK, QUIET, Engine

CACHES = {"f32": 0, "f16": 1, "bf16": 30}  # GGML_TYPE_...; the package names not all of them


def ftype(name):
    """LLAMA_FTYPE_... of a format's name; the K formats' "small" ones are those of a single type."""
    if name == "F32":
        return llama_cpp.LLAMA_FTYPE_ALL_F32
    suffix = "_S" if name in ("Q4_K", "Q5_K") else ""
    return getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}{suffix}")


def quantise(path, name, out):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype(name)
    params.allow_requantize = True
    params.pure = True
    if llama_cpp.llama_model_quantize(path.encode(), out.encode(), params) != 0:
        sys.exit(f"llama.cpp cannot quantise {path} as {name}")


def logits(path, threads, tokens_path, out, cache="f16"):
    ids = [int(line) for line in pathlib.Path(tokens_path).read_text().split()]
    engine = Engine(path, int(threads), 1, len(ids), CACHES[cache])
    with open(out, "wb") as file:
        for start in range(0, len(ids), CHUNK):
            rows = [(token, start + i, 0, True) for i, token in enumerate(ids[start:start + CHUNK])]
            engine.decode(rows)
            found = llama_cpp.llama_get_logits(engine.context)
            np.ctypeslib.as_array(found, shape=(len(rows), engine.vocab)).tofile(file)


def main():
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p())
    what, *rest = sys.argv[1:]
    {"quantise": quantise, "logits": logits}[what](*rest)


if __name__ == "__main__":
    main()
