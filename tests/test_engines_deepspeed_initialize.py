"""effx_dist.deepspeed.initialize on ranks: with and without a block, and what it leaves as it was."""

from __future__ import annotations

import json
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from effx_dist.errors import ConfigError
from tests.deepspeed_runs import (
    BASE,
    BLOCK,
    Model,
    be_a_rank,
    merged,
    needs_deepspeed,
    tokens_of,
    two_groups,
)
from tests.ranks import spawn

pytestmark = [pytest.mark.deepspeed, pytest.mark.ranks, needs_deepspeed]

ADAMW: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}}


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


def engines(folder: Path) -> dict[str, Any]:
    """What initialize does, on one of two ranks."""
    be_a_rank()
    import deepspeed as plain

    from effx_dist import deepspeed

    config = merged(BASE, ADAMW, zero(2))
    found: dict[str, Any] = {}
    for name, block in (("none", {}), ("off", {"effx": {"excp": {"enabled": False}}})):
        engine, optimizer, loader, scheduler = deepspeed.initialize(
            model=Model(), config=merged(config, block)
        )
        same, *_ = plain.initialize(model=Model(), config=merged(config, block))
        found[name] = (
            type(engine) is type(same)
            and type(engine.basic_optimizer) is type(same.basic_optimizer)
            and engine.optimizer is optimizer
            and not hasattr(engine, "effx")
        )

    try:
        deepspeed.initialize(model=Model(), config=merged(config, {"effx": {"cautius": {}}}))
    except ConfigError as error:
        found["refusal"] = str(error)

    path = folder / "ds.json"
    path.write_text(json.dumps(merged(config, BLOCK)))
    args = Namespace(deepspeed_config=str(path), local_rank=-1)
    engine, optimizer, loader, scheduler = deepspeed.initialize(args, Model())
    found["args"] = args.deepspeed_config == str(path) and args.local_rank == engine.local_rank
    found["returns"] = (engine.optimizer is optimizer, loader, scheduler)
    found["block"] = engine.effx.config.to_dict()
    found["learning rates"] = scheduled(deepspeed)
    return found


def scheduled(deepspeed: Any) -> list[float]:
    """The learning rates that the cautious optimizer steps with, under a scheduler that the user made over
    the optimizer that it replaced.
    """
    model = Model()
    given = torch.optim.AdamW(two_groups(model), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(given, lambda step: 0.5**step)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=given, lr_scheduler=scheduler, config=merged(BASE, BLOCK, zero(1))
    )
    seen: list[float] = []
    engine.basic_optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"])
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.*")
        for step in range(3):
            engine.backward(engine(tokens_of(step)))
            engine.step()
    return seen


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(2, engines, tmp_path_factory.mktemp("ranks"), tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("block", ["none", "off"])
def test_is_deepspeeds_own_without_a_block(block: str, found: list[dict[str, Any]]) -> None:
    assert all(of_rank[block] for of_rank in found)


def test_a_refusal_is_on_every_rank(found: list[dict[str, Any]]) -> None:
    assert all("effx.cautius" in of_rank["refusal"] for of_rank in found)


def test_takes_and_leaves_the_arguments(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert of_rank["args"]
        assert of_rank["returns"] == (True, None, None)
        assert of_rank["block"]["cautious"]["enabled"] is True


def test_a_scheduler_over_the_users_optimizer(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        # Two groups are stepped one after the other.
        assert of_rank["learning rates"] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
