"""The files that submit: options in them are real, and each fits the schema of whoever reads it."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs import command
from jobs.segment_config import SegmentConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "jobs" / "deploy"
CRDS = os.environ.get("MASKLINE_KUBERAY_CRDS", "")
"""A folder of KubeRay's custom resource definitions: ray-operator/config/crd/bases of its repository."""


def documents(name: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all((DEPLOY / name).read_text()) if one is not None]


def commands() -> Iterator[str]:
    """Every maskline command that the files hold, comments too."""
    for path in sorted(DEPLOY.iterdir()):
        text = path.read_text()
        yield from re.findall(r"maskline segment [^\"\n]*(?:\n +--[^\"\n]*)*", text)


@pytest.mark.parametrize("line", list(commands()))
def test_commands_are_understood(line: str) -> None:
    found: list[SegmentConfig] = []
    command.run("segment", SegmentConfig, found.append, shlex.split(line)[2:])
    assert found[0].inputs
    assert found[0].actors == "1:8"


@pytest.mark.parametrize("name", ["ray-up-aws.yaml", "ray-up-gcp.yaml"])
def test_ray_takes_the_cluster(name: str) -> None:
    (config,) = documents(name)
    validate_config(prepare_config(config))
    assert all("RAY_AUTH_MODE=token ray start" in line for line in config["head_start_ray_commands"][1:])
    assert all("RAY_AUTH_MODE=token ray start" in line for line in config["worker_start_ray_commands"][1:])


def test_kubernetes_objects_are_what_they_say() -> None:
    (job,) = documents("rayjob.yaml")
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    kinds = {one["kind"]: one for one in documents("nightly.yaml")}
    assert kinds["CronJob"]["spec"]["concurrencyPolicy"] == "Forbid"
    accounts = {kinds["ServiceAccount"]["metadata"]["name"], kinds["RoleBinding"]["subjects"][0]["name"]}
    assert accounts == {kinds["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["serviceAccountName"]}
    assert kinds["RoleBinding"]["roleRef"]["name"] == kinds["Role"]["metadata"]["name"]
    (cron,) = documents("raycronjob.yaml")
    assert cron["spec"]["jobTemplate"] == job["spec"]


@pytest.mark.skipif(not CRDS, reason="needs KubeRay's definitions: MASKLINE_KUBERAY_CRDS names their folder")
@pytest.mark.parametrize(("name", "kind"), [("rayjob.yaml", "rayjobs"), ("raycronjob.yaml", "raycronjobs")])
def test_kuberay_takes_its_objects(name: str, kind: str) -> None:
    definition = yaml.safe_load((Path(CRDS) / f"ray.io_{kind}.yaml").read_text())
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    (document,) = documents(name)
    jsonschema.validate(document, schema)
    assert list(unknown(document, schema, "")) == []


def unknown(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    """Fields that the definition does not name; Kubernetes would drop them."""
    if isinstance(value, dict) and "properties" in schema:
        for key, inner in value.items():
            if key in schema["properties"]:
                yield from unknown(inner, schema["properties"][key], f"{path}.{key}")
            elif path:
                yield f"{path}.{key}"
    elif isinstance(value, list) and "items" in schema:
        for inner in value:
            yield from unknown(inner, schema["items"], f"{path}[]")


def test_the_dashboard_asks_for_what_there_is() -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = set(re.findall(r"ray_maskline_(\w+)", " ".join(queries)))
    written = (ROOT / "pipeline" / "metrics.py").read_text()
    counters = {f"{name}_total" for name in re.findall(r'_counter\(\s*"(\w+)"', written)}
    gauges = set(re.findall(r'Gauge\("maskline_(\w+)"', written))
    assert asked == counters | gauges
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_image_is_made_of_files_that_are_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    assert "USER maskline" in text
