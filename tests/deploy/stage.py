"""The tree that `cmake --install` makes, below a temporary folder, and what one asks of it."""
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("ANTIPHON_BUILD", ROOT / "build/release"))
DAEMONS = ("conductor", "kvstore", "prefill", "decode", "gateway")
SERVICES = [f"antiphon-{daemon}.service" for daemon in DAEMONS]
SKIP = 77


def install(folder):
    """What it said."""
    return subprocess.run(["cmake", "--install", str(BUILD)], env=dict(os.environ, DESTDIR=str(folder)), check=True,
                          capture_output=True, text=True).stdout


class Stage:
    def __init__(self):
        self.temp = tempfile.TemporaryDirectory(prefix="antiphon-stage-")
        self.root = pathlib.Path(self.temp.name)
        install(self.root)
        units = list(self.root.glob("**/lib/systemd/system/antiphon.target"))
        assert len(units) == 1, units
        self.units = units[0].parent
        self.prefix = self.units.parents[2]
        self.config = self.root / "etc/antiphon/antiphon.yaml"
        self.antiphon = self.prefix / "bin/antiphon"

    def settings(self, unit):
        """{key: [values]} of a unit's file."""
        found = {}
        for line in (self.units / unit).read_text().splitlines():
            key, equals, value = line.partition("=")
            if equals and not line.startswith("#"):
                found.setdefault(key, []).append(value)
        return found

    def command(self, unit):
        """ExecStart with the staged program and configuration."""
        words = self.settings(unit)["ExecStart"][0].split()
        return [str(self.root) + word if word.startswith("/") else word for word in words]

    def print_config(self, *arguments):
        """{path: (value, line or None)} of `antiphon config print`."""
        out = subprocess.run([str(self.antiphon), "config", "print", *arguments], check=True, capture_output=True,
                             text=True).stdout
        values, path = {}, []
        for line in out.splitlines():
            text, _, origin = line.partition("# ")
            key, _, value = text.strip().partition(":")
            del path[(len(text) - len(text.lstrip())) // 2:]
            path.append(key)
            if value.strip():
                number = re.search(r":(\d+)$", origin)
                name = ".".join(p for p in path if p != "-")
                values[name] = (value.strip(), int(number.group(1)) if number else None)
        return values


def run(*command, **options):
    """Return code and everything it wrote."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    return done.returncode, done.stdout


def seconds(text):
    total = 0.0
    for number, unit in re.findall(r"([0-9.]+)(h|min|ms|m|s)?", text):
        total += float(number) * {"h": 3600, "min": 60, "m": 60, "ms": 1e-3, "s": 1, "": 1}[unit]
    return total


def main():
    unittest.main(module="__main__", argv=sys.argv, verbosity=2)
