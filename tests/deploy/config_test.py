"""The installed antiphon.yaml and the YAML of the README, as the programs read them."""
import pathlib
import re
import tempfile
import textwrap
import unittest

from stage import ROOT, SERVICES, Stage, main, run

# Depend on the machine or on the caller, so that the file cannot hold the default itself.
MACHINES = {"kvstore.pool", "cluster.runtime_dir"}


def uncommented(text):
    """Every setting active: "#key:" is one, "# " is text."""
    return re.sub(r"^( *)#(?=[a-z_]+:)", r"\1", text, flags=re.M)


def schema_leaves():
    """Every dotted key of config.proto."""
    text = re.sub(r"//.*", "", (ROOT / "proto/antiphon/v1/config.proto").read_text())
    messages = {name: re.findall(r"(?:optional |repeated )?([\w.]+) (\w+) = \d+;", body)
                for name, body in re.findall(r"message (\w+) \{(.*?)\}", text, flags=re.S)}
    leaves = []

    def walk(message, path):
        for kind, name in messages[message]:
            if kind in messages and kind != "ByteSize":
                walk(kind, path + [name])
            else:
                leaves.append(".".join(path + [name]))

    walk("Config", [])
    return leaves


class ConfigTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.stage = Stage()
        cls.text = cls.stage.config.read_text()
        cls.temp = tempfile.TemporaryDirectory(prefix="antiphon-config-")

    def write(self, text):
        path = pathlib.Path(self.temp.name) / "antiphon.yaml"
        path.write_text(text)
        return path

    def check(self, path):
        return run(self.stage.antiphon, "config", "check", "--config", path)

    def test_the_shipped_file_is_good(self):
        self.assertEqual(self.check(self.stage.config), (0, "the configuration is good\n"))

    def test_every_daemon_accepts_its_unit_s_command(self):
        for unit in SERVICES:
            command = self.stage.command(unit)
            self.assertIn(str(self.stage.config), command)
            self.assertEqual(run(*command, "--check-config"), (0, "the configuration is good\n"), unit)
            # That question is not one that says yes to everything.
            self.assertEqual(run(*command, "--confg=x", "--check-config")[0], 64)
            self.assertEqual(run(*command, "--log.level=loud", "--check-config")[0], 78)

    def test_every_setting_is_in_the_file(self):
        full = self.write(uncommented(self.text))
        self.assertEqual(self.check(full), (0, "the configuration is good\n"))
        written = {path for path, (_, line) in self.stage.print_config("--config", full).items() if line is not None}
        leaves = schema_leaves()
        self.assertGreater(len(leaves), 50)
        self.assertEqual(written, set(leaves))

    def test_what_is_behind_a_number_sign_is_the_default(self):
        empty = self.stage.print_config("--config", self.write("version: 1\n"))
        full_text = uncommented(self.text)
        full = self.stage.print_config("--config", self.write(full_text))
        lines = self.text.splitlines()
        compared = 0
        for path, (value, line) in full.items():
            if path in empty and path not in MACHINES and lines[line - 1].lstrip().startswith("#"):
                self.assertEqual(value, empty[path][0], f"{path}, line {line}")
                compared += 1
        self.assertGreater(compared, 30)

    def test_a_misspelt_key_in_it_is_refused_by_line(self):
        broken = uncommented(self.text).replace("node_timeout:", "node_timeuot:")
        line = [n for n, text in enumerate(broken.splitlines(), 1) if "node_timeuot" in text][0]
        code, out = self.check(self.write(broken))
        self.assertEqual(code, 78)
        self.assertIn(f":{line}: conductor.node_timeuot: unknown key; did you mean conductor.node_timeout?", out)

    def test_the_yaml_of_the_readme_is_good(self):
        readme = (ROOT / "deploy/README.md").read_text()
        blocks = [textwrap.dedent(b) for b in re.findall(r"(?:^ {7,}.*\n)+", readme, flags=re.M)]
        blocks = [b for b in blocks if re.match(r"version: 1\n|kvstore:\n", b)]
        self.assertEqual(len(blocks), 2)
        cluster, host = blocks
        path = self.write(cluster)
        self.assertEqual(self.check(path), (0, "the configuration is good\n"))
        parts = pathlib.Path(self.temp.name) / "conf.d"
        parts.mkdir()
        (parts / "10-host.yaml").write_text(host)
        try:
            self.assertEqual(self.check(path), (0, "the configuration is good\n"))
            values = self.stage.print_config("--config", path)
        finally:
            (parts / "10-host.yaml").unlink()
            parts.rmdir()
        self.assertEqual(values["kvstore.data.advertise"][0], "10.0.0.2")
        # On several machines nothing may be left on loopback.
        self.assertEqual([p for p, (v, _) in values.items() if p.endswith(".listen") and v.startswith("127.")], [])


main()
