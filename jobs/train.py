"""maskline train: a COCO dataset in, weights out, on one worker or many, evaluated on the way.

    driver: options → dataset, starting network → Ray Train → workers
    worker: batch → losses → gradients → step → record; now and then a checkpoint and an evaluation

Ray Train starts the workers, and starts them again after one has died; they go on from the newest checkpoint in the
output, as a run does whose driver has died and that is given ``--resume``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.table import Table

from jobs.command import run
from jobs.starting_network import StartingNetwork, starting_network
from jobs.train_config import TrainConfig
from jobs.train_worker import Training
from jobs.trainee import MakeTrainee, our_trainee
from jobs.training_setup import Task
from model.optimiser import build_optimiser
from model.weights import to_bytes
from pipeline import checkpoints, cluster, storage
from pipeline.batch_sampler import steps_in_epochs
from pipeline.coco import CocoDataset, Wanted, find_missing_files, read_coco
from pipeline.coco_evaluation import category_mapping
from pipeline.errors import ConfigError, PipelineError
from pipeline.training_data import with_objects
from pipeline.uris import local_path


def train(config: TrainConfig, make_trainee: MakeTrainee = our_trainee) -> dict[str, Any]:
    """Run it; what came of it. For comparison, ``make_trainee`` takes the place of our network and its losses.

    Raises:
        ConfigError: the request is wrong; nothing was started.
        PipelineError: the run ended before its last step.
    """
    config = _with_absolute_paths(config)
    task = prepare(config, make_trainee)
    device = cluster.choose_device(config.device, config.address)
    cluster.connect(config.address)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    with tempfile.TemporaryDirectory(prefix="maskline-train-") as folder, _printed(events) as last, _stop_on_sigterm():
        trainer = ray.train.torch.TorchTrainer(
            work,
            train_loop_config={"task": ray.put(task), "events": events},
            scaling_config=ray.train.ScalingConfig(
                num_workers=_bounds(config),
                use_gpu=device == "cuda",
                resources_per_worker={"CPU": _cpus(config, device)},
            ),
            run_config=ray.train.RunConfig(
                name=f"train-{os.getpid()}",
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                worker_runtime_env={"env_vars": cluster.WORKER_ENVIRONMENT},
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise PipelineError(f"the training failed: {_cause(error)}; {_how_to_go_on(config)}") from error
        except SystemExit:  # what Ray Train makes of Ctrl-C, once it has ended its workers
            pass
    if "result" not in last:
        raise PipelineError(last.get("stopped") or f"stopped; {_how_to_go_on(config)}")
    result: dict[str, Any] = last["result"]
    return result


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Workers have folders of their own."""
    names = ("output", "train_images", "val_images", "cache_folder")
    given = {name: local_path(getattr(config, name) or "") for name in names}
    absolute: dict[str, Any] = {name: os.path.abspath(path) for name, path in given.items() if path}
    return replace(config, **absolute)


def prepare(config: TrainConfig, make_trainee: MakeTrainee = our_trainee) -> Task:
    """Read and check all that can be before a worker starts."""
    step = checkpoints.newest_step(config.output)
    if step is not None and not config.resume:
        raise ConfigError(
            f"{config.output} holds a run that has come to step {step}; go on with --resume, or give another output"
        )
    dataset = _dataset(config.train_annotations, config.train_images, config)
    val = None
    if config.val_annotations is not None and config.val_images is not None:
        val = _dataset(config.val_annotations, config.val_images, config)
    if not config.keep_empty:
        num_before = len(dataset.images)
        dataset = with_objects(dataset)
        if num_empty := num_before - len(dataset.images):
            print(f"{num_empty} images without objects are left out; --keep-empty trains on them")
    start = starting_network(
        name=config.model,
        init=config.init,
        categories=dataset.categories,
        changes=_config_changes(config, dataset),
        recipe_changes={} if config.max_detections is None else {"max_detections": config.max_detections},
        seed=config.seed,
    )
    _check_trainable(config, start, val)
    weights = to_bytes(start.network, start.config, start.recipe, start.categories)
    _check_same_run(config, dataset, weights)
    num_steps = steps_in_epochs(len(dataset.images), config.epochs, config.batch_size)
    parameters = sum(parameter.numel() for parameter in start.network.parameters())
    print(f"network: {start.how}, {parameters:,} parameters")
    print(
        f"train on {len(dataset.images)} images of {len(dataset.categories)} categories, {num_steps} steps"
        f" → {config.output}"
    )
    return Task(
        config=config,
        weights=weights,
        train=dataset,
        val=val,
        num_steps=num_steps,
        make_trainee=make_trainee,
    )


def _dataset(annotations: str, images: str, config: TrainConfig) -> CocoDataset:
    """What of it can be used; the rest is said."""
    masks: Wanted = frozenset({"masks"} if config.mask_head else ())
    keypoints: Wanted = frozenset({"keypoints"} if config.keypoints else ())
    dataset = find_missing_files(read_coco(annotations, wanted=masks | keypoints), images)
    if len(dataset.defects):
        print(f"{storage.public_uri(annotations)}: {dataset.defects}")
    return dataset


def _config_changes(config: TrainConfig, dataset: CocoDataset) -> dict[str, Any]:
    changes: dict[str, Any] = {} if config.norm == "keep" else {"norm": config.norm}
    changes["mask_head"] = "fcn" if config.mask_head else "none"
    changes["num_keypoints"] = dataset.num_keypoints if config.keypoints else 0
    sides = {"min_size": config.min_size, "max_size": config.max_size}
    return changes | {name: side for name, side in sides.items() if side is not None}


def _check_trainable(config: TrainConfig, start: StartingNetwork, val: CocoDataset | None) -> None:
    """Refuse what would only fail in the workers."""
    if start.config.proposals == "given":
        raise ConfigError("a Fast R-CNN needs proposals, which a COCO file does not hold; start from one with an RPN")
    if start.config.norm == "sync" and cluster.choose_device(config.device, config.address) == "cpu":
        raise ConfigError("norm sync needs device cuda; use --norm group, or batch")
    if config.precision == "fp64" and cluster.choose_device(config.device, config.address) == "cuda":
        raise ConfigError("precision fp64 needs device cpu; use fp32 or bf16 on a GPU")
    if val is not None:
        category_mapping(start.categories, val.categories)
    try:
        build_optimiser(start.network, config.optimiser)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_same_run(config: TrainConfig, dataset: CocoDataset, weights: bytes) -> None:
    """A run that is resumed must have what its losses follow from; that of a new one is written down."""
    images = [
        (image.image_id, image.file_name, image.size, [(one.category_id, one.box) for one in image.annotations])
        for image in dataset.images
    ]
    settings = {
        **config.curve_settings(),
        "train_annotations": hashlib.sha256(json.dumps(images).encode()).hexdigest(),
        "starting network": hashlib.sha256(weights).hexdigest(),
    }
    uri = storage.join(config.output, "training.json")
    text = json.dumps(settings, indent=1)
    if not config.resume or not storage.exists(uri):
        storage.write_bytes(uri, text.encode())
        return
    before = json.loads(storage.read_bytes(uri))
    changed = [name for name, value in json.loads(text).items() if before.get(name) != value]
    if changed:
        raise ConfigError(
            f"{config.output} holds a run with other {', '.join(changed)}; --resume goes on with those of before "
            f"({uri}), another output begins anew"
        )


def _bounds(config: TrainConfig) -> int | tuple[int, int]:
    low, high = config.bounds()
    return high if low == high else (low, high)


def _cpus(config: TrainConfig, device: cluster.Device) -> float:
    workers = config.bounds()[1]
    shape = cluster.actor_shape(device)
    return config.cpus_per_worker or shape.cpus_for(workers)


@contextlib.contextmanager
def _printed(events: Queue) -> Iterator[dict[str, Any]]:
    """Lines of the first worker are printed as they come; what it says last is kept by its kind."""
    last: dict[str, Any] = {}

    def follow() -> None:
        while True:
            try:
                kind, said = events.get(timeout=10)
            except Empty:
                continue
            if kind == "end":
                return
            if kind == "line":
                print(said, flush=True)
            else:
                last[kind] = said

    thread = threading.Thread(target=follow, name="training-lines", daemon=True)
    thread.start()
    try:
        yield last
    finally:
        with contextlib.suppress(ray.exceptions.RayError):  # a cluster that is gone has nothing more to say
            events.put(("end", None), timeout=10)
            thread.join(timeout=30)


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """SIGTERM is Ctrl-C, which Ray Train ends its workers on; Ray's own handler would abort this process."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _how_to_go_on(config: TrainConfig) -> str:
    step = checkpoints.newest_step(config.output)
    return "there is no checkpoint yet" if step is None else f"the checkpoint of step {step} stays: go on with --resume"


def _cause(error: BaseException) -> str:
    """The innermost error's first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def work(given: dict[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    Training(ray.get(given["task"]), given["events"]).run()


def main(config: TrainConfig) -> None:
    """The command: train, and say what came of it."""
    if config.peer == "torchvision":
        from jobs.torchvision_training_peer import torchvision_trainee

        result = train(config, torchvision_trainee)
    else:
        result = train(config)
    table = Table("score", "last", "best", title=f"{result['steps']} steps in {result['seconds'] / 60:.1f} minutes")
    for name, value in result["scores"].items():
        table.add_row(name, f"{value:.3f}", f"{result['best_scores'].get(name, value):.3f}")
    if result["scores"]:
        Console().print(table)
    print(f"weights: {result['weights']}")
    if config.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run("train", TrainConfig, main)
