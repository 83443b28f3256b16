"""The pinned source package of llama-cpp-python: vocabularies with vectors, and chat templates."""
import glob
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
ARCHIVE = f"llama_cpp_python-{VERSION}.tar.gz"


def download(folder):
    """By pip, which verifies the digest; it also prepares the metadata, in some seconds."""
    requirement = os.path.join(folder, "requirements.txt")
    with open(requirement, "w", encoding="utf-8") as f:
        f.write(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
               "llama-cpp-python", "--require-hashes", "-r", requirement, "-d", folder]
    subprocess.run(command, check=False)
    return os.path.exists(os.path.join(folder, ARCHIVE))


def peer_folder(cache):
    """The folder `vendor/llama.cpp` with its `models`, unpacked under `cache`; None when the
    package cannot be had."""
    target = os.path.join(cache, f"llama_cpp_python-{VERSION}")
    inside = os.path.join(target, "vendor", "llama.cpp")
    if os.path.exists(os.path.join(target, "complete")):
        return inside
    os.makedirs(cache, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        if not download(work):
            return None
        with tarfile.open(os.path.join(work, ARCHIVE)) as archive:
            members = [m for m in archive.getmembers() if "/vendor/llama.cpp/models/" in m.name]
            archive.extractall(work, members=members)
        unpacked = glob.glob(os.path.join(work, f"llama_cpp_python-{VERSION}"))[0]
        with open(os.path.join(unpacked, "complete"), "w", encoding="utf-8"):
            pass
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unpacked, target)
    return inside
