"""Every include of src/ follows an arrow of ARCHITECTURE.md. Mains are exempt, tests and bench too."""
import pathlib
import re
import sys

ARROWS = {
    "common": set(),
    "transfer": {"common"},
    "model": {"common"},
    "engine": {"model", "common"},
    "kvstore": {"transfer", "common"},
    "kvstore/client": {"common"},
    "prefill": {"engine", "kvstore/client", "common"},
    "decode": {"engine", "kvstore/client", "common"},
    "worker": {"prefill", "decode", "engine", "model", "kvstore/client", "common"},
    "conductor": {"common"},
    "gateway": {"model", "common"},
    "cli": {"conductor", "model", "common"},
}
THIRD_PARTY = ("absl/", "fmt/", "hwy/", "google/", "grpcpp/", "yaml-cpp/")
NO_PROTO = {"engine"}  # builds where there is CUDA and CMake and no protobuf
PROTO_ADAPTERS = {"engine/wire_sampling.h"}  # header for prefill and decode; engine compiles none of it
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"')


def room_of(path):
    """The longest room that holds `path` (relative to src/)."""
    parts = path.split("/")
    for n in (2, 1):
        room = "/".join(parts[:n])
        if room in ARROWS and len(parts) > n:
            return room
    return None


def main():
    src = pathlib.Path(sys.argv[1]) / "src"
    problems, checked = [], 0
    for file in sorted(src.rglob("*")):
        if file.suffix not in (".h", ".cc", ".cu") or file.name == "main.cc":
            continue
        name = file.relative_to(src).as_posix()
        room = room_of(name)
        if room is None:
            problems.append(f"{name}: in no room")
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            match = INCLUDE.match(line)
            if not match:
                continue
            target = match.group(1)
            if target.startswith(THIRD_PARTY):
                continue
            checked += 1
            if target.startswith("antiphon/v1/"):
                if room in NO_PROTO and name not in PROTO_ADAPTERS:
                    problems.append(f"{name}:{number}: {room} must build without protobuf")
                continue
            to = room_of(target)
            if to is None:
                problems.append(f"{name}:{number}: \"{target}\" is in no room; includes start with the room's name")
            elif to != room and to not in ARROWS[room] and not to.startswith(room + "/"):
                problems.append(f"{name}:{number}: no arrow from {room} to {to}")
    if checked == 0:
        problems.append("nothing was checked")
    print("\n".join(problems) or f"{checked} includes follow the arrows")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
