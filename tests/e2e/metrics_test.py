"""`promtool check metrics` on every daemon of a cluster that has served a request; what every daemon must
export is there; /livez and /readyz say yes."""
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

from cluster import Cluster, ROOT, SKIP


def fetch(address, path):
    with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as response:
        return response.read().decode()


def wait_ready(address, seconds=60):
    """A cluster serves with its first workers; the others follow."""
    deadline = time.time() + seconds
    while True:
        try:
            return fetch(address, "/readyz")
        except urllib.error.HTTPError as e:
            assert e.code == 503 and time.time() < deadline, (address, e)
            time.sleep(0.05)


def main():
    promtool = shutil.which("promtool", path=os.environ["PATH"] + f":{ROOT}/build/tools/usr/bin")
    if promtool is None:
        print("skipped: no promtool")
        return SKIP
    with Cluster(prefill=2, decode=1) as cluster:
        for stream in (False, True):
            cluster.request("POST", "/v1/completions", {"prompt": "One, two, three,", "max_tokens": 8, "stream": stream})
        cluster.request("POST", "/v1/completions", {"prompt": 1, "temperature": 9})
        pages = {"gateway on the API's port": cluster.get("/metrics")}
        kinds = []
        for child in cluster.runtime_file()["children"]:
            kinds.append(child["daemon"])
            pages[child["daemon"] + " " + child["ops"]] = fetch(child["ops"], "/metrics")
            assert fetch(child["ops"], "/livez")
            wait_ready(child["ops"])
        assert sorted(kinds) == ["conductor", "decode", "gateway", "kvstore", "prefill", "prefill"], kinds
        for name, page in pages.items():
            check = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True)
            assert check.returncode == 0, f"{name}: {check.stdout}{check.stderr}"
            kind = name.split()[0]
            kind = "worker" if kind in ("prefill", "decode") else kind
            assert "antiphon_build_info{" in page, name
            series = [line for line in page.splitlines() if line and not line.startswith("#")]
            assert all(f'daemon="{kind}"' in line for line in series if line.startswith("antiphon_")), name
            print(f"{name}: {len(series)} series", flush=True)
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
