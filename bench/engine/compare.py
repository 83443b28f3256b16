#!/usr/bin/env python3
"""Speed of the CPU engine beside llama.cpp's: the same file, cores and threads, in one run.

    bench/engine/compare.py [--model FILE] [--engine-bench PROGRAM] [--threads 2] [--rounds 5]

Builds llama-cpp-python (pinned in requirements.txt) into build/bench-venv first, for what this processor
has except AMX, whose kernels g++ 12 miscompiles. Each measurement is a process of its own; the
competitors take turns, and swap who is first from round to round. Prints a Markdown table of medians with
the range of the rounds, and exits with 1 when a median is below --least of llama.cpp's.
"""
import argparse
import datetime
import hashlib
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
VENV = ROOT / "build" / "bench-venv"
MODEL = "antiphon/models/SmolLM2-135M-Instruct.Q4_1.gguf"
CASES = [("prompt", 128), ("prompt", 512), ("prompt", 2048), ("generate", 1), ("generate", 4), ("generate", 16)]
# CMake's name of a feature and the flags of /proc/cpuinfo that it needs.
FEATURES = {
    "AVX2": ["avx2"], "FMA": ["fma"], "F16C": ["f16c"], "BMI2": ["bmi2"],
    "AVX512": ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
    "AVX512_VBMI": ["avx512vbmi"], "AVX512_VNNI": ["avx512_vnni"], "AVX512_BF16": ["avx512_bf16"],
}


def cpuinfo(field):
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def llama_cpp_options():
    flags = set(cpuinfo("flags").split())
    wanted = [name for name, needs in FEATURES.items() if flags.issuperset(needs)]
    return " ".join(["-DGGML_NATIVE=OFF"] + [f"-DGGML_{name}=ON" for name in wanted])


def need_venv():
    """The competitor's Python environment; made anew when pins or options change."""
    requirements = HERE / "requirements.txt"
    options = llama_cpp_options()
    wanted = requirements.read_text() + options + "\n"
    stamp = VENV / ".made-of"
    python = VENV / "bin" / "python"
    if stamp.exists() and stamp.read_text() == wanted:
        return python, options
    print("building llama-cpp-python into build/bench-venv, log beside it (minutes)", file=sys.stderr)
    shutil.rmtree(VENV, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    others = [line for line in requirements.read_text().split() if not line.startswith("llama-cpp-python")]
    with VENV.with_suffix(".log").open("w") as log:
        subprocess.run(pip + others, check=True, stdout=log, stderr=log)
        # Built here and now, never a wheel from a cache that was built with other options.
        subprocess.run(pip + ["--no-build-isolation", "--no-cache-dir", "--no-deps", "-r", requirements], check=True,
                       stdout=log, stderr=log,
                       env=os.environ | {"CMAKE_ARGS": options, "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}"})
    stamp.write_text(wanted)
    return python, options


def output(command, **options):
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout.strip()


def default_model():
    data = os.environ.get("XDG_DATA_HOME") or pathlib.Path.home() / ".local/share"
    return os.environ.get("ANTIPHON_MODEL") or str(pathlib.Path(data) / MODEL)


def spread(values):
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=default_model())
    parser.add_argument("--engine-bench", default=str(ROOT / "build/release/bin/engine_bench"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--least", type=float, default=0.5)
    args = parser.parse_args()
    for path in (args.model, args.engine_bench):
        if not pathlib.Path(path).is_file():
            sys.exit(f"{path} is missing (scripts/quickstart fetches the model and builds)")
    python, options = need_venv()
    cores = sorted(os.sched_getaffinity(0))[:args.threads]
    if len(cores) < args.threads:
        sys.exit(f"{args.threads} threads are asked for, {len(cores)} cores are granted")
    os.sched_setaffinity(0, cores)
    programs = {
        "antiphon": [args.engine_bench, args.model, str(args.threads)],
        "llama.cpp": [python, HERE / "llama_cpp_bench.py", args.model, str(args.threads)],
    }
    load = os.getloadavg()[0]
    results = {(name, case): [] for name in programs for case in CASES}
    for number in range(args.rounds):
        for case in CASES:
            for name in list(programs)[::1 if number % 2 == 0 else -1]:
                speed = float(output(programs[name] + [case[0], str(case[1])]))
                results[name, case].append(speed)
                print(f"round {number + 1} {case[0]} {case[1]} {name}: {speed:,.0f}", file=sys.stderr)
    with open(args.model, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    isa = output([args.engine_bench, "--instruction-set"])
    print(f"- CPU: {cpuinfo('model name')} (family {cpuinfo('cpu family')}, model {cpuinfo('model')}), {args.threads} threads on "
          f"cores {','.join(map(str, cores))}; load average {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end")
    print(f"- date {datetime.date.today()}, commit {output(['git', '-C', ROOT, 'rev-parse', '--short', 'HEAD'])}, "
          f"antiphon's kernels: {isa}; llama.cpp: {requirement()}, {options}")
    print(f"- model {pathlib.Path(args.model).name}, sha256 {digest[:16]}; {args.rounds} rounds, tokens/s: median (lowest-highest)\n")
    print("| case | antiphon | llama.cpp | ratio of medians |\n|---|---|---|---|")
    failed = False
    for case in CASES:
        ours, theirs = results["antiphon", case], results["llama.cpp", case]
        ratio = statistics.median(ours) / statistics.median(theirs)
        failed = failed or ratio < args.least
        label = f"prompt, {case[1]} tokens" if case[0] == "prompt" else f"generate, {case[1]} stream{'s' * (case[1] > 1)}"
        print(f"| {label} | {spread(ours)} | {spread(theirs)} | {ratio:.2f} |")
    if failed:
        sys.exit(f"below {args.least} of llama.cpp")


def requirement():
    return next(line for line in (HERE / "requirements.txt").read_text().split() if line.startswith("llama-cpp"))


if __name__ == "__main__":
    main()
