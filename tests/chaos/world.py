"""What faults befall: an archive, a Ray cluster of several nodes on this machine, a store, and drivers that use them.

All of it is real: ``maskline segment`` as a user types it, Ray's own processes, a disk of its own that can be full, an
S3 server behind a proxy that can be cut off. Only what was started here is ever signalled.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from ray._common.utils import reset_ray_address
from ray.cluster_utils import Cluster

import model
from model.recipe import Recipe
from model.structures import ImageSize
from pipeline import storage, uris
from pipeline.results import open_results
from pipeline.scenes import draw_scene
from tests.pipeline.s3_server import FaultyProxy, running_server
from tests.reference import processes

NODES = 3
"""Of the cluster, each with one CPU."""
STALL_SECONDS = 8
"""After which an actor that stands still has its shards issued again."""
END_SECONDS = 240.0
"""A driver that has not ended so long after all faults hangs."""
DISK_BYTES = 96 * 1024**2
SIZE = ImageSize(48, 64)

ENVIRONMENT = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_worker_niceness": "0",
    "RAY_metrics_report_interval_ms": "1000",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}

RUN_JOBS = (
    "import faulthandler, runpy, signal; faulthandler.register(signal.SIGUSR1); "
    "runpy.run_module('jobs', run_name='__main__', alter_sys=True)"
)
"""``python -m jobs``, which says on SIGUSR1 what each of its threads does."""


def make_archive(folder: Path, num_images: int) -> list[Path]:
    """Folder, tar and zip to segment: a hundredth of the images is damaged in one of several ways."""
    inputs = [folder / "loose", folder / "members.tar", folder / "members.zip"]
    inputs[0].mkdir(parents=True)
    scenes = [draw_scene(seed, SIZE).image for seed in range(40)]
    with tarfile.open(inputs[1], "w") as tar, zipfile.ZipFile(inputs[2], "w") as zipped:
        for index in range(num_images):
            file = BytesIO()
            Image.fromarray(np.roll(scenes[index % 40], index, axis=1)).save(file, "JPEG", quality=90)  # all differ
            data = file.getvalue() if index % 100 != 50 else _damaged(file.getvalue(), index // 100)
            name = f"{index:05d}.jpg"
            if index % 5 == 3:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
            elif index % 5 == 4:
                zipped.writestr(name, data)
            else:
                (inputs[0] / name).write_bytes(data)
    return inputs


def _network() -> model.MaskRCNN:
    """As little to compute as there can be: the faults are to find everything else at work."""
    recipe = Recipe(rpn_post_nms=40, max_detections=8)
    return model.random_network(model.R18_half_FPN(num_classes=6, min_size=48, max_size=64), seed=0, recipe=recipe)


def _damaged(data: bytes, number: int) -> bytes:
    return (data[: len(data) // 2], b"", b"no image", data[:20] * 40)[number % 4]


class World:
    """One use each, as a context manager."""

    def __init__(self, folder: Path, num_images: int, *, nodes: int = NODES) -> None:
        self.folder, self.num_images = folder, num_images
        self.proxy: FaultyProxy
        self.drivers: list[subprocess.Popen[bytes]] = []
        """Those that run; the first is the one that is watched."""
        self.disk = folder / "disk"
        self._num_nodes, self._stack = nodes, ExitStack()

    def __enter__(self) -> World:
        with self._stack as stack:
            self.inputs = make_archive(self.folder / "archive", self.num_images)
            self.weights = self.folder / "small.safetensors"
            model.save(_network(), self.weights)
            server = stack.enter_context(running_server())
            self.proxy = stack.enter_context(FaultyProxy(server))
            stack.enter_context(_environment(ENVIRONMENT | {"AWS_ENDPOINT_URL": server}))  # who looks on has no faults
            uris.forget_clients()
            uris.resolve("s3://chaos")[0].mkdir("chaos")
            stack.callback(uris.forget_clients)
            self.has_own_disk = stack.enter_context(_disk(self.disk))
            stack.callback(self._end)
            self.start_cluster()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # The cluster

    def start_cluster(self) -> None:
        self._cluster = Cluster(shutdown_at_exit=False)
        for _ in range(self._num_nodes):
            self.add_node()

    def add_node(self) -> None:
        with _environment({"AWS_ENDPOINT_URL": self.proxy.endpoint}):
            self._cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=80 * 1024**2)

    def stop_cluster(self) -> None:
        """Whatever state it is in."""
        nodes = [*self._cluster.worker_nodes, *([self._cluster.head_node] if self._cluster.head_node else [])]
        for node in nodes:
            with suppress(Exception):  # of some processes nothing is left
                node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        self.end_all([pid for pid in processes.descendants(os.getpid()) if "ray" in processes.command(pid)])
        reset_ray_address()  # of the cluster last started here, which Ray Train would wait for

    @staticmethod
    def end_all(pids: Sequence[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, kind: str) -> list[int]:
        """Of the cluster: actors, raylets or the GCS. The head node's raylet is left out: its death is the GCS's."""
        part = {"actor": "ray::SegmentActor", "raylet": "raylet/raylet ", "gcs": "gcs_server "}[kind]
        found = sorted(processes.named(part))
        head = self._cluster.head_node
        heads = {started.process.pid for started in head.all_processes["raylet"]} if head is not None else set()
        return [pid for pid in found if pid not in heads]

    # Drivers

    def start_driver(self, output: str) -> subprocess.Popen[bytes]:
        """The command, as a user would repeat it."""
        command = [
            *(sys.executable, "-c", RUN_JOBS, "segment", *map(str, self.inputs), "--output", output),
            *("--weights", str(self.weights), "--images-per-shard", "50", "--actors", "1:3", "--cpus-per-actor", "1"),
            *("--score-threshold", "0.5", "--stall-timeout", str(STALL_SECONDS), "--address", self._cluster.address),
        ]
        with self.log(output).open("ab") as log:
            environment = os.environ | {"AWS_ENDPOINT_URL": self.proxy.endpoint}
            driver = subprocess.Popen([*command, "--json"], stdout=log, stderr=log, env=environment)
        self.drivers.append(driver)
        return driver

    def log(self, output: str) -> Path:
        return self.folder / f"{output.rsplit('/', 1)[-1]}.log"

    def tail(self, output: str) -> str:
        """The end of what drivers of this table said, and what those that run are doing."""
        for driver in self.drivers:
            if driver.poll() is None:
                driver.send_signal(signal.SIGUSR1)
        time.sleep(1.0)
        return self.log(output).read_text(errors="replace")[-8000:]

    def end_of(self, driver: subprocess.Popen[bytes]) -> int:
        """Its exit status, once it has ended by itself."""
        status = driver.wait(END_SECONDS)
        self.drivers.remove(driver)
        return status

    # Tables

    def table(self, number: int) -> str:
        """Where the table of that number lies: on the disk and in the store by turns."""
        return f"s3://chaos/table-{number}" if number % 2 else str(self.disk / f"table-{number}")

    def num_commits(self, output: str) -> int:
        try:
            return sum(1 for _ in storage.list_files(storage.join(output, "_commits")))
        except OSError:
            return 0

    def rows(self, output: str) -> dict[str, pa.Table]:
        """All that a user sees, in an order that does not hang on who made it."""
        results = open_results(output)
        tables = {"images": results.images().to_table(), "instances": results.instances().to_table()}
        orders = {"images": ["image_key"], "instances": ["image_key", "instance_index"]}
        return {
            name: table.drop_columns([column for column in ("run", "run_id") if column in table.column_names]).sort_by(
                [(column, "ascending") for column in orders[name]]
            )
            for name, table in tables.items()
        }

    def _end(self) -> None:
        self.end_all([driver.pid for driver in self.drivers])
        for driver in self.drivers:
            driver.wait()
        self.stop_cluster()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _disk(folder: Path) -> Iterator[bool]:
    """A folder on a small disk of its own, where this process may mount one."""
    folder.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=False, capture_output=True
        ).returncode
        == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


def differences(found: dict[str, pa.Table], expected: dict[str, pa.Table], *, whole: bool) -> dict[str, Any]:
    """What of a table is not as the undisturbed one has it: images doubled, changed, and where it is `whole`, lost."""
    keys = found["images"]["image_key"].to_pylist()
    here = pa.array(sorted(set(keys)))
    wrong: dict[str, Any] = {"doubled": len(keys) - len(set(keys))}
    if whole:
        wrong["lost"] = expected["images"].num_rows - len(here)
    for name, table in expected.items():
        of_these = table.filter(pa.compute.is_in(table["image_key"], value_set=here))
        wrong[f"changed {name}"] = 0 if found[name].equals(of_these) else 1
    return {name: count for name, count in wrong.items() if count}


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it came to hold within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False
