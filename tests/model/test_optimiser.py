from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from model.optimiser import (
    OptimiserConfig,
    average,
    build_optimiser,
    drop_frozen_gradients,
    learning_rate_at,
    set_learning_rate,
    take_step,
)

BATCH = 16


def make_network(seed: int = 0) -> nn.Sequential:
    """Parameters 0.weight, 0.bias, 1.weight, 1.bias (a norm's) and 2.weight, 2.bias; statistics of the norm."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def step_once(network: nn.Module, optimiser: torch.optim.Optimizer, step: int, config: OptimiserConfig) -> Tensor:
    """One step as the training loop takes it: its loss and norm."""
    optimiser.zero_grad(set_to_none=True)
    torch.manual_seed(step)
    loss = network(torch.randn(8, 4)).square().sum()
    loss.backward()
    drop_frozen_gradients(network, step, config)
    return take_step(optimiser, [loss.detach()], config)


# ------------------------------------------------------------------------------------------------------ learning rate


def test_rate_rises_in_proportion_from_a_thousandth() -> None:
    config = OptimiserConfig(learning_rate=0.02, warmup_steps=10, milestones=())
    rates = [learning_rate_at(step, 100, batch_size=BATCH, config=config) for step in (0, 5, 10, 99)]
    half_way = (0.001 + 1) / 2
    assert rates == pytest.approx([0.02 * 0.001, 0.02 * half_way, 0.02, 0.02], rel=1e-12)


def test_rate_falls_tenfold_at_each_milestone() -> None:
    config = OptimiserConfig(learning_rate=0.02, warmup_steps=0, milestones=(0.5, 0.75))
    rates = [learning_rate_at(step, 8, batch_size=BATCH, config=config) for step in range(8)]
    assert rates == pytest.approx([0.02] * 4 + [0.002] * 2 + [0.0002] * 2, rel=1e-12)


def test_default_milestones_are_those_of_a_schedule_of_90_000_steps() -> None:
    """detectron2's 1x: 60,000 and 80,000 of 90,000."""
    config = OptimiserConfig()
    rates = [
        learning_rate_at(step, 90_000, batch_size=BATCH, config=config) for step in (59_999, 60_000, 79_999, 80_000)
    ]
    assert rates == pytest.approx([0.02, 0.002, 0.002, 0.0002], rel=1e-12)


def test_cosine_begins_at_the_rate_is_half_of_it_half_way_and_ends_near_nothing() -> None:
    config = OptimiserConfig(learning_rate=0.02, warmup_steps=0, schedule="cosine")
    rates = [learning_rate_at(step, 100, batch_size=BATCH, config=config) for step in range(100)]
    assert [rates[0], rates[50]] == pytest.approx([0.02, 0.01], rel=1e-12)
    assert rates[25] == pytest.approx(0.01 * (1 + math.sqrt(0.5)), rel=1e-12)
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[99] < 0.02 * 0.001


def test_warmup_and_a_milestone_before_its_end_are_multiplied() -> None:
    config = OptimiserConfig(learning_rate=1.0, warmup_steps=8, milestones=(0.25,))
    assert learning_rate_at(4, 16, batch_size=BATCH, config=config) == pytest.approx(0.1 * (0.001 + 0.999 / 2))


@pytest.mark.parametrize("schedule", ["steps", "cosine"])
@pytest.mark.parametrize("batch_size", [1, 2, 16, 64])
def test_rate_is_in_proportion_to_the_batch(schedule: Literal["steps", "cosine"], batch_size: int) -> None:
    config = OptimiserConfig(schedule=schedule, warmup_steps=3)
    for step in range(10):
        of_reference = learning_rate_at(step, 10, batch_size=16, config=config)
        rate = learning_rate_at(step, 10, batch_size=batch_size, config=config)
        assert rate == pytest.approx(of_reference * batch_size / 16, rel=1e-12)


def test_rate_is_that_of_all_groups() -> None:
    optimiser = build_optimiser(make_network(), OptimiserConfig())
    set_learning_rate(optimiser, 0.125)
    assert [group["lr"] for group in optimiser.param_groups] == [0.125, 0.125]


# ------------------------------------------------------------------------------------------------------------- freeze


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_what_is_frozen_for_ever_has_no_gradient_and_stays(kind: Literal["sgd", "adamw"]) -> None:
    config = OptimiserConfig(kind=kind, learning_rate=0.1, weight_decay=0.1, freeze=("0.", "2.bias"))
    network = make_network()
    optimiser = build_optimiser(network, config)
    frozen = {"0.weight", "0.bias", "2.bias"}
    assert {name for name, one in network.named_parameters() if not one.requires_grad} == frozen
    before = parameters_of(network)
    for step in range(3):
        step_once(network, optimiser, step, config)
    after = parameters_of(network)
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_what_is_frozen_at_first_stays_until_its_step_and_is_trained_from_it_on(
    kind: Literal["sgd", "adamw"],
) -> None:
    """With momentum and weight decay, either of which would move a parameter whose gradient is merely zero."""
    config = OptimiserConfig(kind=kind, learning_rate=0.1, momentum=0.9, weight_decay=0.1, freeze=("0.@3",))
    network = make_network()
    optimiser = build_optimiser(network, config)
    assert all(parameter.requires_grad for parameter in network.parameters())
    seen = [parameters_of(network)]
    for step in range(5):
        step_once(network, optimiser, step, config)
        seen.append(parameters_of(network))
    for step, (before, after) in enumerate(pairwise(seen)):
        unchanged = {name for name in before if torch.equal(before[name], after[name])}
        assert unchanged == ({"0.weight", "0.bias"} if step < 3 else set()), step


def test_a_parameter_under_two_rules_is_frozen_by_the_longer_one() -> None:
    network = make_network()
    build_optimiser(network, OptimiserConfig(freeze=("0.@2", "0.weight")))
    assert not network[0].weight.requires_grad
    config = OptimiserConfig(learning_rate=0.1, freeze=("0.@2", "0.weight@1"))
    network = make_network()
    optimiser = build_optimiser(network, config)
    before = parameters_of(network)
    step_once(network, optimiser, 1, config)
    assert torch.equal(parameters_of(network)["0.weight"], before["0.weight"])


def test_a_rule_that_is_lifted_is_lifted() -> None:
    """The network of a run that froze it may be trained by another."""
    network = make_network()
    build_optimiser(network, OptimiserConfig(freeze=("0.",)))
    build_optimiser(network, OptimiserConfig())
    assert all(parameter.requires_grad for parameter in network.parameters())


# ------------------------------------------------------------------------------------------------------- weight decay


def test_one_step_is_what_is_computed_by_hand() -> None:
    """w - rate (gradient + decay w) for a weight; biases and norms w - rate gradient."""
    config = OptimiserConfig(learning_rate=0.1, momentum=0.9, weight_decay=0.25)
    network = make_network()
    optimiser = build_optimiser(network, config)
    before = parameters_of(network)
    step_once(network, optimiser, 0, config)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        decay = 0.25 if name in ("0.weight", "2.weight") else 0.0
        expected = before[name] - 0.1 * (parameter.grad + decay * before[name])
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_without_gradients_weights_shrink_and_biases_and_norms_stay(kind: Literal["sgd", "adamw"]) -> None:
    config = OptimiserConfig(kind=kind, learning_rate=0.1, weight_decay=0.5)
    network = make_network()
    optimiser = build_optimiser(network, config)
    before = parameters_of(network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for name, value in parameters_of(network).items():
        kept = 1 - 0.1 * 0.5 if value.dim() > 1 else 1.0
        torch.testing.assert_close(value, before[name] * kept)


# --------------------------------------------------------------------------------------------------------- whole steps


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_steps_are_those_of_torchs_own_loop(kind: Literal["sgd", "adamw"], clip_norm: float) -> None:
    config = OptimiserConfig(kind=kind, learning_rate=1e-3, weight_decay=0.1, clip_norm=clip_norm)
    network, plain = make_network(), make_network()
    optimiser = build_optimiser(network, config)
    groups = [
        {"params": [one for one in plain.parameters() if (one.dim() > 1) is decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    reference = (
        torch.optim.SGD(groups, lr=1e-3, momentum=0.9, foreach=False)
        if kind == "sgd"
        else torch.optim.AdamW(groups, lr=1e-3, foreach=False)
    )
    for step in range(5):
        numbers = step_once(network, optimiser, step, config)
        reference.zero_grad()
        torch.manual_seed(step)
        loss = plain(torch.randn(8, 4)).square().sum()
        loss.backward()
        norm = torch.stack([one.grad.norm() for one in plain.parameters() if one.grad is not None]).norm()
        torch.testing.assert_close(numbers, torch.stack([loss.detach(), norm]))
        for one in plain.parameters():
            assert one.grad is not None
            one.grad *= min(1.0, (clip_norm or math.inf) / float(norm))
        reference.step()
        for found, expected in zip(network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("num_before", [0, 2])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nothing_changes_where_something_is_not_finite(
    kind: Literal["sgd", "adamw"], num_before: int, what: str
) -> None:
    config = OptimiserConfig(kind=kind, learning_rate=0.1, weight_decay=0.1)
    network = make_network()
    optimiser = build_optimiser(network, config)
    for step in range(num_before):
        step_once(network, optimiser, step, config)
    before = copy.deepcopy((network.state_dict(), optimiser.state_dict()["state"]))
    undisturbed = copy.deepcopy((network, optimiser.state_dict()))
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    loss = torch.tensor(1.0)
    if what == "loss":
        loss = torch.tensor(math.inf)
    else:
        weights = network.get_parameter("2.weight").grad
        assert weights is not None
        weights[0, 1] = math.nan
    assert not take_step(optimiser, [loss], config).isfinite().all()
    after = (network.state_dict(), optimiser.state_dict()["state"])
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    if num_before > 0:
        torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)
    again = build_optimiser(undisturbed[0], config)
    again.load_state_dict(undisturbed[1])
    for one, of in ((network, optimiser), (undisturbed[0], again)):
        step_once(one, of, 7, config)
    torch.testing.assert_close(network.state_dict(), undisturbed[0].state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_state_of_an_optimiser_that_is_not_fused_can_be_gone_on_with(kind: Literal["sgd", "adamw"]) -> None:
    config = OptimiserConfig(kind=kind, learning_rate=1e-3, weight_decay=0.1, freeze=("0.@3",))
    networks = make_network(), make_network()
    optimiser, other = (build_optimiser(network, config) for network in networks)
    for step in range(2):
        step_once(networks[0], optimiser, step, config)
    state = copy.deepcopy(optimiser.state_dict())
    for group in state["param_groups"]:
        group |= {"fused": None, "foreach": None}
    trained = state["param_groups"][0]["params"][1]
    state["state"].pop(state["param_groups"][0]["params"][0], None)  # of what is frozen there was none
    if kind == "adamw":
        state["state"][trained]["step"] = state["state"][trained]["step"].cpu()
    networks[1].load_state_dict(networks[0].state_dict())
    other.load_state_dict(state)
    for network, one in zip(networks, (optimiser, other), strict=True):
        for step in (2, 3, 4):
            step_once(network, one, step, config)
    torch.testing.assert_close(networks[0].state_dict(), networks[1].state_dict(), rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------- moving average


def test_average_is_that_of_a_slow_loop_statistics_included() -> None:
    config = OptimiserConfig(learning_rate=1e-3, ema=0.75)
    network = make_network()
    optimiser = build_optimiser(network, config)
    averaged = copy.deepcopy(network)
    slow = {name: value.double() for name, value in network.state_dict().items()}
    for step in range(40):
        step_once(network, optimiser, step, config)
        average(averaged, network, step=step, config=config)
        share = min(0.75, (step + 1) / (step + 10))
        for name, value in network.state_dict().items():
            slow[name] = share * slow[name] + (1 - share) * value.double()
    assert (39 + 1) / (39 + 10) > 0.75  # both branches of the share are met
    found = averaged.state_dict()
    floats = [name for name, value in found.items() if value.is_floating_point()]
    assert {"0.weight", "1.running_mean", "1.running_var"} <= set(floats)
    for name in floats:
        torch.testing.assert_close(found[name].double(), slow[name], rtol=1e-5, atol=1e-5)
    assert found["1.num_batches_tracked"] == network.state_dict()["1.num_batches_tracked"] == 40


def test_average_of_what_stays_is_what_stays() -> None:
    network = make_network()
    averaged = copy.deepcopy(network)
    for step in range(5):
        average(averaged, network, step=step, config=OptimiserConfig(ema=0.9))
    for mean, value in zip(averaged.state_dict().values(), network.state_dict().values(), strict=True):
        assert torch.equal(mean, value)


# ------------------------------------------------------------------------------------------------------------ refusal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "adam"}, r"kind must be one of sgd, adamw, got 'adam'"),
        ({"learning_rate": 0.0}, r"learning_rate must be above 0, got 0.0"),
        ({"learning_rate": math.nan}, r"learning_rate must be finite"),
        ({"momentum": 1.0}, r"momentum must be below 1, got 1.0"),
        ({"momentum": -0.1}, r"momentum must be at least 0, got -0.1"),
        ({"weight_decay": -1e-4}, r"weight_decay must be at least 0"),
        ({"warmup_steps": -1}, r"warmup_steps must be at least 0, got -1"),
        ({"schedule": "linear"}, r"schedule must be one of steps, cosine"),
        ({"milestones": (0.5, 0.25)}, r"milestones must rise"),
        ({"milestones": (0.5, 1.0)}, r"milestones must rise and lie between 0 and 1"),
        ({"clip_norm": -1.0}, r"clip_norm must be at least 0, got -1.0"),
        ({"ema": 1.0}, r"ema must be below 1, got 1.0"),
        ({"freeze": ("",)}, r"freeze must be PREFIX or PREFIX@STEPS, got ''"),
        ({"freeze": ("body@",)}, r"got 'body@'"),
        ({"freeze": ("body@soon",)}, r"got 'body@soon'"),
        ({"freeze": ("@5",)}, r"got '@5'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimiserConfig(**changes)


def test_a_rule_of_which_no_name_is_the_beginning_is_refused() -> None:
    for rule in ("boby", "boby@500"):
        with pytest.raises(ValueError, match=rf"freeze.*'{rule}'"):
            build_optimiser(make_network(), OptimiserConfig(freeze=("0.", rule)))


def test_freezing_everything_for_ever_is_refused() -> None:
    with pytest.raises(ValueError, match="freeze leaves no parameter to train"):
        build_optimiser(make_network(), OptimiserConfig(freeze=("0", "1", "2")))
    build_optimiser(make_network(), OptimiserConfig(freeze=("0@9", "1@9", "2@9")))
