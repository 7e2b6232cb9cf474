"""What Prometheus scrapes of a node is what the table holds."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.cluster_utils import Cluster

import model
from pipeline.results import open_results
from pipeline.scenes import write_archive

INTERVAL = "1000"
"""Milliseconds between two reports of a process."""


class Node(NamedTuple):
    """A cluster of one."""

    address: str
    metrics: str


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", INTERVAL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster = Cluster(shutdown_at_exit=False)
    head = cluster.add_node(num_cpus=2, include_dashboard=False, metrics_export_port=port)
    yield Node(cluster.address, f"http://{head.node_ip_address}:{port}/metrics")
    cluster.shutdown()


def scraped(url: str) -> dict[tuple[str, ...], float]:
    """Name and the tags of ours that are not empty → value."""
    with urllib.request.urlopen(url) as answer:
        text = answer.read().decode()
    return {
        (
            sample.name,
            *(sample.labels[tag] for tag in ("status", "reason", "commit") if sample.labels.get(tag)),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("ray_maskline_")
    }


@pytest.mark.slow
def test_scraped_counts_are_the_table_s(node: Node, tmp_path: Path) -> None:
    archive, output, weights = tmp_path / "archive", tmp_path / "out", tmp_path / "w.safetensors"
    write_archive(archive, num_images=18, seed=0)
    (archive / "bad.jpg").write_bytes(b"no image")
    net = model.random_network(model.R18_half_FPN(num_classes=6, min_size=48, max_size=64), seed=0)
    model.save(net, weights)
    command = [
        sys.executable,
        "-m",
        "jobs",
        "segment",
        str(archive),
        "--output",
        str(output),
        "--weights",
        str(weights),
    ]
    run = subprocess.run(
        [*command, "--images-per-shard", "5", "--address", node.address],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found, results = scraped(node.metrics), open_results(str(output))
    assert found["ray_maskline_images_total", "ok"] == 18
    assert found["ray_maskline_images_total", "failed", "unreadable"] == 1
    assert found["ray_maskline_instances_total",] == results.instances().count_rows()
    assert found["ray_maskline_commits_total", "won"] == len(results.commits) == 4
    assert found["ray_maskline_model_busy_seconds_total",] > 0
