#!/usr/bin/env python3
"""What can be said of the CUDA kernels without a GPU, on sm_90: none of ours spills registers to local
memory and FlashInfer's spill no more than they do today, the attention multiplies on the tensor
cores, and the sources launch and copy on streams of their own, never on the default one.

    ptx_check.py NVCC HOUSE FLASHINFER
"""

import pathlib
import re
import subprocess
import sys
import tempfile


# Of FlashInfer 0.6.17 with nvcc 13.0: its kernel of 16 queries keeps 296 bytes in local memory.
FLASHINFER_SPILL_BYTES = 320


def compile_ptx(nvcc, house, flashinfer, source, folder):
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-use_fast_math", "-arch=compute_90", "-ptx"]
    includes = [f"-I{house}/src", f"-I{flashinfer}/include"]
    includes += [f"-I{flashinfer}/cccl/{part}" for part in ("libcudacxx/include", "cub", "thrust")]
    out = pathlib.Path(folder) / (source.stem + ".ptx")
    subprocess.run([nvcc, *flags, *includes, "-o", out, source], check=True)
    return out


def spills(nvcc, ptx):
    """(kernel, bytes of stack, bytes spilled) of every kernel."""
    ptxas = pathlib.Path(nvcc).resolve().parent / "ptxas"
    report = subprocess.run([ptxas, "-v", "-arch=sm_90", "-o", "/dev/null", ptx], check=True,
                            capture_output=True, text=True).stderr
    pattern = r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores"
    return [(name, int(stack), int(spilled)) for name, stack, spilled in re.findall(pattern, report)]


def main():
    nvcc, house, flashinfer = sys.argv[1:]
    folder = pathlib.Path(house) / "src/engine/cuda"
    failures = []
    with tempfile.TemporaryDirectory() as temporary:
        for source in sorted(folder.glob("*.cu")):
            ptx = compile_ptx(nvcc, house, flashinfer, source, temporary)
            kernels = spills(nvcc, ptx)
            text = ptx.read_text()
            entries = re.split(r"\.visible \.entry |\.entry ", text)[1:]
            worst = max((spilled for _, _, spilled in kernels), default=0)
            print(f"{source.name}: {len(kernels)} kernels, {text.count('mma.sync')} mma.sync, "
                  f"at most {worst} bytes spilled")
            for name, stack, spilled in kernels:
                bound = FLASHINFER_SPILL_BYTES if "flashinfer" in name else 0
                if max(stack, spilled) > bound:
                    failures.append(f"{source.name} {name}: {stack} bytes of stack, {spilled} spilled")
            attention = [e for e in entries if "BatchPrefillWithPagedKVCacheKernel" in e.split("(")[0]]
            if source.stem in ("attention_64", "attention_128"):
                if len(attention) < 3:
                    failures.append(f"{source.name}: {len(attention)} attention kernels, not 3 or more")
                failures += [f"{source.name} {e.split('(')[0]}: no mma.sync"
                             for e in attention if "mma.sync" not in e]
            elif source.stem in ("kernels", "few_rows", "checksum") and not kernels:
                failures.append(f"{source.name}: no kernels")
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".cu", ".cc", ".cuh", ".h"):
            continue
        text = path.read_text(encoding="utf-8")
        failures += [f"{path.name}: a launch without a stream: <<<{launch}>>>"
                     for launch in re.findall(r"<<<(.*?)>>>", text, re.S) if launch.count(",") < 3]
        failures += [f"{path.name}: {call}...) runs on the default stream"
                     for call in re.findall(r"\bcuda(?:Memcpy|Memset|Memcpy2D)\(", text)]
    for failure in failures:
        print("FAILED:", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
