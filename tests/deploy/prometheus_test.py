"""prometheus.yml and alerts.yml, as promtool reads them and as the daemons' sources name things."""
import re
import shutil
import sys
import unittest

from stage import DAEMONS, ROOT, SKIP, Stage, main, run

RULES_TEST = ROOT / "tests/deploy/alerts_test.yml"


class PrometheusTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.stage = Stage()
        cls.folder = cls.stage.prefix / "share/antiphon"

    def test_promtool_accepts_the_configuration_and_its_rules(self):
        code, out = run("promtool", "check", "config", self.folder / "prometheus.yml")
        self.assertEqual(code, 0, out)
        self.assertRegex(out, r"SUCCESS: [1-9]\d* rules found")

    def test_alerts_fire_when_they_should_and_not_before(self):
        rules = self.folder / "alerts_test.yml"
        shutil.copy(RULES_TEST, rules)
        code, out = run("promtool", "test", "rules", rules)
        self.assertEqual(code, 0, out)
        alerts = set(re.findall(r"alert: (\w+)", (self.folder / "alerts.yml").read_text()))
        tested = set(re.findall(r"alertname: (\w+)", RULES_TEST.read_text()))
        self.assertEqual(alerts, tested)

    def test_every_daemon_is_scraped_at_its_default_port(self):
        config = self.stage.print_config("--config", self.stage.config)
        keys = {"prefill": "worker.prefill_ops.listen", "decode": "worker.decode_ops.listen"}
        expected = {f"antiphon-{d}": "localhost:" + config[keys.get(d, f"{d}.ops.listen")][0].rsplit(":", 1)[1] for d in DAEMONS}
        text = (self.folder / "prometheus.yml").read_text()
        jobs = re.findall(r'job_name: (\S+)\n +static_configs:\n +- targets: \["([^"]+)"\]', text)
        self.assertEqual(len(jobs), len(DAEMONS))
        self.assertEqual(dict(jobs), expected)

    def test_metrics_and_label_values_of_the_alerts_are_in_the_code(self):
        code = "".join(p.read_text() for p in (ROOT / "src").rglob("*.cc"))
        expressions = re.sub(r"\{\{.*?\}\}", "", (self.folder / "alerts.yml").read_text())
        metrics = set(re.findall(r"\bantiphon_\w+", expressions))
        self.assertGreater(len(metrics), 3)
        for metric in metrics:
            self.assertIn(f'"{metric}"', code)
        labels = re.findall(r'(\w+)=~?"([^"]*)"', expressions)
        for label, value in labels:
            if label == "job":
                continue
            self.assertIn(f'{{"{label}", ', code)
            if re.fullmatch(r"\w+", value) and not value.isdigit():
                self.assertRegex(code, f'"{value}"')


if shutil.which("promtool") is None:
    print("skipped: no promtool")
    sys.exit(SKIP)
main()
