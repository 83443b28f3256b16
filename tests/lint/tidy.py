"""House rules that a compiler does not check: real time, threads, randomness and the environment come
in from outside (common/ and main.cc excepted); no words of unfinished work; no machine's paths."""
import pathlib
import re
import subprocess
import sys

WORLD = re.compile(
    r"(steady_clock|system_clock|high_resolution_clock)::now|absl::Now\(|absl::SleepFor|sleep_for|\busleep\("
    r"|\bnanosleep\(|\bsleep\(|std::thread\b|std::jthread\b|random_device|\brand\(\)|\bsrand\(|\bgetenv\(")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|\b[Nn]ot implemented|\b[Uu]nimplemented\b|\b[Pp]laceholder")
PLACES = re.compile(r"/(?:root|work|home/[a-z]+)/")
CODE = (".h", ".cc", ".cu", ".cuh")


def main():
    root = pathlib.Path(sys.argv[1])
    try:
        names = subprocess.run(["git", "-C", root, "ls-files"], capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        names = [p.relative_to(root).as_posix() for p in root.rglob("*") if "build" not in p.parts and ".git" not in p.parts]
    problems, checked = [], 0
    for name in names:
        path = root / name
        if not name or not path.is_file() or path.suffix in (".gguf", ".bin", ".binpb", ".jsonl") or "corpus" in path.parts or name.startswith("tests/lint/"):
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        checked += 1
        decision = name.startswith("src/") and not name.startswith("src/common/") and path.name != "main.cc" and path.suffix in CODE
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{name}:{number}"
            if decision and WORLD.search(line.split("//")[0]):
                problems.append(f"{where}: real time, threads, randomness and the environment come in by constructor: {line.strip()}")
            if name.startswith(("src/", "proto/", "deploy/", "scripts/", "cmake/")) and UNFINISHED.search(line):
                problems.append(f"{where}: unfinished work: {line.strip()}")
            if PLACES.search(line):
                problems.append(f"{where}: a machine's path: {line.strip()}")
            if path.suffix in CODE and name.startswith("src/") and len(line) > 100:
                problems.append(f"{where}: {len(line)} columns; 100 are the limit")
    if checked == 0:
        problems.append("nothing was checked")
    print("\n".join(problems) or f"{checked} files are tidy")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
