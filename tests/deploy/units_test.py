"""The installed units, user and folders, as systemd's own tools see them."""
import os
import pathlib
import shutil
import stat
import unittest

from stage import DAEMONS, SERVICES, Stage, install, main, run, seconds

# systemd-analyze security counts in tenths: 0 is sealed off, 100 is no protection.
EXPOSURE_MAX = 14


def add_system(stage):
    """What units refer to: systemd's own targets, and /bin/kill."""
    system = stage.root / "usr/lib/systemd/system"
    system.mkdir(parents=True, exist_ok=True)
    for unit in list(pathlib.Path("/lib/systemd/system").glob("*.target")) + list(pathlib.Path("/lib/systemd/system").glob("*.mount")):
        shutil.copy(unit, system, follow_symlinks=True)
    kill = stage.root / "bin/kill"
    kill.parent.mkdir(exist_ok=True)
    shutil.copy("/bin/kill", kill)


class UnitsTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.stage = Stage()
        add_system(cls.stage)

    def verify(self, *units):
        return run("systemd-analyze", "verify", f"--root={self.stage.root}", "--man=no", *units)

    def test_systemd_accepts_every_unit(self):
        installed = sorted(p.name for p in self.stage.units.iterdir())
        self.assertEqual(installed, sorted([*SERVICES, "antiphon.slice", "antiphon.target"]))
        self.assertEqual(self.verify(*installed), (0, ""))

    def test_verify_sees_a_missing_program_and_an_unknown_setting(self):
        unit = self.stage.units / "antiphon-broken.service"
        text = (self.stage.units / SERVICES[0]).read_text()
        try:
            unit.write_text(text.replace("/antiphon-conductor ", "/antiphon-nobody "))
            self.assertIn("antiphon-nobody is not executable", self.verify(unit.name)[1])
            unit.write_text(text.replace("LimitCORE=", "LimitCoRE="))
            self.assertIn("Unknown key 'LimitCoRE'", self.verify(unit.name)[1])
        finally:
            unit.unlink()

    def test_units_are_sealed_off(self):
        for unit in SERVICES:
            code, out = run("systemd-analyze", "security", "--offline=true", f"--root={self.stage.root}",
                            f"--threshold={EXPOSURE_MAX}", "--no-pager", unit)
            self.assertEqual(code, 0, f"{unit}:\n{out}")
            self.assertIn("Overall exposure level", out)

    def test_a_unit_may_take_as_long_to_stop_as_its_daemon_may_drain(self):
        config = self.stage.print_config("--config", self.stage.config)
        for daemon, unit in zip(DAEMONS, SERVICES):
            section = "worker" if daemon in ("prefill", "decode") else daemon
            drain = sum(seconds(config[f"{section}.drain.{key}"][0]) for key in ("delay", "deadline"))
            self.assertEqual(seconds(self.stage.settings(unit)["TimeoutStopSec"][0]), drain + 10, unit)

    def test_units_notify_and_are_watched_and_stay_down_after_errors_that_stay(self):
        for unit in SERVICES:
            settings = self.stage.settings(unit)
            self.assertEqual(settings["Type"], ["notify"])
            self.assertEqual(settings["WantedBy"], ["antiphon.target"])
            self.assertEqual(settings["PartOf"], ["antiphon.target"])
            self.assertGreater(seconds(settings["WatchdogSec"][0]), 1)
            self.assertEqual(settings["Restart"], ["on-failure"])
            # common/daemon.h: usage, bad model file, configuration.
            self.assertEqual(settings["RestartPreventExitStatus"], ["64 65 78"])

    def test_daemons_of_a_host_share_the_folder_of_their_sockets(self):
        runtime_dir = self.stage.print_config("--config", self.stage.config)["cluster.runtime_dir"][0]
        for unit in SERVICES:
            settings = self.stage.settings(unit)
            self.assertEqual((settings["User"], settings["Group"]), (["antiphon"], ["antiphon"]))
            if "gateway" in unit:
                continue
            self.assertEqual(["/run/" + d for d in settings["RuntimeDirectory"]], [runtime_dir], unit)
            # Else systemd removes it when the first of them stops.
            self.assertEqual(settings["RuntimeDirectoryPreserve"], ["yes"], unit)

    def test_the_store_outlives_its_workers_and_the_conductor_all(self):
        after = {unit: " ".join(self.stage.settings(unit)["After"]).split() for unit in SERVICES}
        for worker in ("antiphon-prefill.service", "antiphon-decode.service"):
            self.assertIn("antiphon-kvstore.service", after[worker])
        for unit in SERVICES[1:]:
            self.assertIn("antiphon-conductor.service", after[unit])
        for unit in SERVICES:  # a daemon that dies takes no other one with it
            for hard in ("Requires", "BindsTo", "Requisite"):
                self.assertNotIn(hard, self.stage.settings(unit))

    def test_sysusers_makes_the_user_and_tmpfiles_the_folders(self):
        code, out = run("systemd-sysusers", f"--root={self.stage.root}", "--dry-run")
        self.assertEqual(code, 0, out)
        self.assertIn("Creating user 'antiphon'", out)
        self.assertIn("Would write /etc/passwd", out)
        if os.geteuid() != 0:
            self.skipTest("folders of another user are made by root alone")
        self.assertEqual(run("systemd-sysusers", f"--root={self.stage.root}")[0], 0)
        users = dict((f[0], f) for f in (line.split(":") for line in (self.stage.root / "etc/passwd").read_text().splitlines()))
        uid, gid = (int(n) for n in users["antiphon"][2:4])
        keys = self.stage.root / "etc/antiphon/keys.yaml"
        keys.write_text("")
        keys.chmod(0o644)
        code, out = run("systemd-tmpfiles", f"--root={self.stage.root}", "--create")
        self.assertEqual((code, out), (0, ""))
        for path, mode, owner in (("run/antiphon", 0o750, (uid, gid)), ("var/lib/antiphon/models", 0o755, (0, 0)),
                                  ("etc/antiphon/keys.yaml", 0o640, (0, gid))):
            found = os.stat(self.stage.root / path)
            self.assertEqual((stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid), (mode, *owner), path)

    def test_installing_again_keeps_what_the_operator_wrote(self):
        with open(self.stage.config, "a") as config:
            config.write("log: {level: debug}\n")
        written = self.stage.config.read_text()
        try:
            self.assertIn(f"Kept: {self.stage.config}", install(self.stage.root))
            self.assertEqual(self.stage.config.read_text(), written)
            pristine = self.stage.prefix / "share/antiphon/antiphon.yaml"
            self.assertTrue(written.startswith(pristine.read_text()))
        finally:
            shutil.copy(self.stage.prefix / "share/antiphon/antiphon.yaml", self.stage.config)

    def test_the_documentation_that_units_name_is_installed(self):
        for unit in [*SERVICES, "antiphon.target"]:
            for address in self.stage.settings(unit)["Documentation"]:
                self.assertTrue((self.stage.root / address.removeprefix("file:///")).is_file(), address)


main()
