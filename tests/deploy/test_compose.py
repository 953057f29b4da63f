"""docker-compose.yml names files, ports and settings that exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from service.settings import Settings

ROOT = Path(__file__).parents[2]


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    return found


def test_everything_mounted_is_there() -> None:
    named = set(yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["volumes"])
    for service in services().values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in named or (ROOT / source).exists(), volume
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_only_loopback_is_published_and_everything_is_hardened() -> None:
    for service in services().values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_settings_exist() -> None:
    for name in services()["twogate"]["environment"]:
        assert name.removeprefix("TWOGATE_").lower() in Settings.model_fields


def test_the_names_in_the_configurations_are_services() -> None:
    known = set(services()) | {"app"}
    assert services()["album"]["networks"]["default"]["aliases"] == ["app"]
    nginx = (ROOT / "deploy/nginx/nginx.conf").read_text(encoding="utf-8")
    assert "server app:8080" in nginx
    assert "server twogate:8000" in nginx
    targets = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"][0][
        "static_configs"
    ]
    assert targets[0]["targets"] == ["twogate:8000"]
    for service in services().values():
        assert set(service.get("depends_on", ())) <= known
