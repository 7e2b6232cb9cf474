"""How a network's parameters are changed: optimiser, learning rate at each step, and which are left as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.checked import Checked, at_least

REFERENCE_BATCH = 16
"""Images in the batch that learning rates are given for."""


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig(Checked):
    """Defaults are those of He et al. 2017 as detectron2 trains it."""

    kind: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW (Loshchilov & Hutter 2019)."""
    learning_rate: float = 0.02
    """For a batch of 16 images; another batch's is in proportion (Goyal et al. 2017)."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """Of weights; biases and norms have none."""
    warmup_steps: int = 1000
    """Steps in which the rate rises in proportion from a thousandth of itself."""
    schedule: Literal["steps", "cosine"] = "steps"
    """The rate falls tenfold at each of the milestones, or along half a cosine to nothing."""
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)
    """Shares of the run."""
    clip_norm: float = 10.0
    """The gradient's norm is brought down to this; 0 leaves it."""
    ema: float = 0.0
    """Share of the average that each step keeps in the exponential moving average of the weights, which is then what is
    evaluated and saved; 0 takes the weights themselves. It grows towards this from 0 in the first steps."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, by the beginnings of their names: body.stem for the whole run, body@500 for its
    first 500 steps."""

    def check(self) -> None:
        at_least(self, 0, "momentum", "weight_decay", "warmup_steps", "clip_norm", "ema")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        for name in ("momentum", "ema"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be below 1, got {getattr(self, name)}")
        if any(not 0 < share < 1 for share in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones must rise and lie between 0 and 1, got {self.milestones}")
        for rule in self.freeze:
            prefix, at, step = rule.partition("@")
            if not prefix or (at and not step.isdecimal()):
                raise ValueError(f"an item of freeze must be PREFIX or PREFIX@STEPS, got {rule!r}")


def learning_rate_at(step: int, num_steps: int, *, batch_size: int, config: OptimiserConfig) -> float:
    """The rate of `step`, from 0, of a run of `num_steps`."""
    rate = config.learning_rate * batch_size / REFERENCE_BATCH
    if step < config.warmup_steps:
        rate *= 0.001 + 0.999 * step / config.warmup_steps
    if config.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / num_steps))
    passed = sum(step >= share * num_steps for share in config.milestones)
    return float(rate * 0.1**passed)


def build_optimiser(network: nn.Module, config: OptimiserConfig) -> torch.optim.Optimizer:
    """Over the parameters that are ever trained; those that never are stop taking part in gradients."""
    for rule in config.freeze:
        if not any(name.startswith(rule.partition("@")[0]) for name in network.state_dict()):
            raise ValueError(f"freeze must hold beginnings of parameters' names, and none begins as {rule!r} does")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(frozen_until(name, config) != math.inf)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(f"freeze leaves no parameter to train, got {config.freeze}")
    groups = [
        {"params": [one for one in trained if one.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [one for one in trained if one.dim() <= 1], "weight_decay": 0.0},
    ]
    # Fused, they leave a step out where the device has found that it should be.
    optimiser: torch.optim.Optimizer
    if config.kind == "adamw":
        optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    else:
        optimiser = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)
    optimiser.register_load_state_dict_pre_hook(_as_fused)
    optimiser.register_load_state_dict_post_hook(_fill_momentum)
    _fill_momentum(optimiser)
    return optimiser


def _as_fused(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """That of an optimiser which may not have been."""
    return {**state, "param_groups": [{**group, "fused": True, "foreach": None} for group in state["param_groups"]]}


def _fill_momentum(optimiser: torch.optim.Optimizer) -> None:
    """Zeros, which are what there is before the first step: fused SGD wants all or none of them."""
    for group in optimiser.param_groups:
        for parameter in group["params"] if group.get("momentum", 0) > 0 else ():
            if optimiser.state[parameter].get("momentum_buffer") is None:
                optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def frozen_until(name: str, config: OptimiserConfig) -> float:
    """The step from which a parameter is trained; infinity for never."""
    rules = [rule.partition("@") for rule in config.freeze]
    return max((float(step) if at else math.inf for prefix, at, step in rules if name.startswith(prefix)), default=0.0)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def drop_frozen_gradients(network: nn.Module, step: int, config: OptimiserConfig) -> None:
    """Parameters that are not trained yet have no gradient, so the optimiser passes over them."""
    if config.freeze:
        for name, parameter in network.named_parameters():
            if step < frozen_until(name, config):
                parameter.grad = None


def take_step(optimiser: torch.optim.Optimizer, losses: Sequence[Tensor], config: OptimiserConfig) -> Tensor:
    """Clip the gradients and change the parameters; where a loss or the gradients' norm is not finite nothing changes.

    The losses, scalars, and behind them the norm leave, on their device, which nothing here waits for.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
    numbers = torch.stack([*losses, norm])
    optimiser.found_inf = (~numbers.isfinite().all()).float()  # type: ignore[attr-defined]  # as GradScaler says it
    optimiser.step()
    return numbers


@torch.no_grad()
def average(into: nn.Module, network: nn.Module, *, step: int, config: OptimiserConfig) -> None:
    """One step of the exponential moving average of a network's weights and statistics, kept in a copy of it."""
    share = min(config.ema, (1 + step) / (10 + step))  # or it would be the first weights for long
    pairs = list(zip(into.state_dict().values(), network.state_dict().values(), strict=True))
    averaged = [pair for pair in pairs if pair[0].is_floating_point()]
    means, values = zip(*averaged, strict=True)
    torch._foreach_lerp_(means, values, 1 - share)
    for count, value in (pair for pair in pairs if not pair[0].is_floating_point()):
        count.copy_(value)
