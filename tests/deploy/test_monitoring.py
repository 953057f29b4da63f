"""The dashboard and the alerts speak of metrics that exist, and docs/operate.md speaks of all of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from service.problems import all_problems
from tests.deploy.ports import free_port, listening
from tests.service.support import ThreadServer, wait_until

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
DASHBOARD = ROOT / "deploy/grafana/twogate.json"
_NAME = re.compile(r"\b(?:twogate|process)_[a-z_]+")


@pytest.fixture(scope="module")
def exposed(gate: ThreadServer, photo: bytes, suspicious: bytes) -> str:
    """A live /metrics, after some traffic."""
    with httpx.Client(base_url=gate.url) as client:
        for body in (photo, suspicious, b"no picture"):
            client.post("/v1/scan", content=body, headers={"Content-Type": "image/jpeg"})
        return client.get("/metrics").text


def rules() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]
    return found


def queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]] + [
        rule["expr"] for rule in rules()
    ]


def test_every_metric_in_use_exists(exposed: str) -> None:
    series = {line.split("{")[0].split(" ")[0] for line in exposed.splitlines() if line and not line.startswith("#")}
    declared = set(re.findall(r"^# TYPE (\S+)", exposed, re.MULTILINE))
    used = {name for query in queries() for name in _NAME.findall(query)}
    assert used
    assert used - series - declared == set()


def test_the_labels_in_use_exist(exposed: str) -> None:
    reasons = {problem.name for problem in all_problems()}
    for query in queries():
        for reason in re.findall(r'reason=~?"([^"]+)"', query):
            assert set(reason.split("|")) <= reasons
        for bound in re.findall(r'twogate_p_value_bucket{[^}]*le="([^"]+)"', query):
            assert f'twogate_p_value_bucket{{le="{bound}"}}' in exposed
    assert 'twogate_verdicts_total{flagged="true"}' in exposed
    assert 'route="/v1/scan"' in exposed


def test_panels_do_not_overlap_and_have_one_id_each() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_every_metric_and_alert_is_explained(exposed: str) -> None:
    guide = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
    ours = {name for name in re.findall(r"^# TYPE (twogate_\S+)", exposed, re.MULTILINE) if not name.endswith("_created")}
    assert {name for name in ours if f"`{name}`" not in guide} == set()
    assert {rule["alert"] for rule in rules() if f"### {rule['alert']}\n" not in guide} == set()


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
@pytest.mark.parametrize("command", ["check rules alerts.yml", "test rules alerts.test.yml"])
def test_prometheus_takes_the_rules(command: str) -> None:
    subprocess.run(["promtool", *command.split()], cwd=ALERTS.parent, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.skipif(not shutil.which("prometheus"), reason="Prometheus is not installed")
def test_a_real_prometheus_scrapes_the_service_and_answers_every_panel(
    gate: ThreadServer, exposed: str, tmp_path: Path
) -> None:
    configuration = yaml.safe_load((ALERTS.parent / "prometheus.yml").read_text(encoding="utf-8"))
    configuration["global"]["scrape_interval"] = "500ms"
    configuration["rule_files"] = [str(ALERTS)]
    configuration["scrape_configs"][0]["static_configs"][0]["targets"] = [gate.url.removeprefix("http://")]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    port = free_port()
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        wait_until(lambda: listening(port))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            wait_until(lambda: client.get("/-/ready").status_code == 200)

            def result(query: str) -> list[Any]:
                filled = query.replace("$job", ".+").replace("$__rate_interval", "1m")
                answer = client.get("/api/v1/query", params={"query": filled})
                assert answer.status_code == 200, (query, answer.text)
                found: list[Any] = answer.json()["data"]["result"]
                return found

            wait_until(lambda: result("count_over_time(twogate_ready[1m]) > 2"))
            for query in queries():
                result(query)
            ready, served = queries()[:2]
            assert result(ready)[0]["value"][1] == "1"
            assert result(served)[0]["metric"]["name"] == "tiny"
            assert not result('ALERTS{alertname=~"TwogateDown|TwogateNotReady"}')
    finally:
        process.terminate()
        process.wait(10)
