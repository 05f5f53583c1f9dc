"""engine.save_checkpoint and load_checkpoint as DeepSpeed has them: tags, options, returns, refusals; and
FSDP2 and DeepSpeed's own checkpoints on the other side.

All cases run in one spawn of 2 ranks, since starting them is what these tests cost.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from effx_dist.checkpoint import Checkpointer, inspect_folder
from effx_dist.checkpoint.storage.tags import tags_of
from effx_dist.config import ExcpConfig
from effx_dist.data import ProgressLR
from effx_dist.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    LayoutMismatchError,
    RankFailedError,
)
from tests.deepspeed_checkpoint_runs import (
    BF16,
    FP16,
    SMALL,
    TORCHS,
    assert_cast,
    assert_same,
    frozen_of,
    make_engine,
    sharded,
    state_of,
    state_of_fsdp,
    train,
    train_fsdp,
)
from tests.deepspeed_runs import Model, be_a_rank, needs_deepspeed, tokens_of
from tests.ranks import spawn

pytestmark = [pytest.mark.ranks, pytest.mark.deepspeed, needs_deepspeed]

EXACT = ExcpConfig(profile="lossless", keep_latest_k=0)
Case = Callable[[Path], None]
CASES: dict[str, Case] = {}


def case(body: Case) -> Case:
    CASES[body.__name__] = body
    return body


def refused(call: Callable[[], Any], kinds: Any, *parts: str) -> None:
    """The call raises one of these errors, with these parts in its message, on this rank."""
    with pytest.raises(kinds) as caught:
        call()
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


# From one engine to another


@case
def goes_on_as_if_it_had_not_stopped(folder: Path) -> None:
    engine = make_engine(3, SMALL)
    train(engine, 2)
    engine.save_checkpoint(str(folder))
    expected, state = train(engine, 2), state_of(engine)
    engine.load_checkpoint(str(folder))
    assert train(engine, 2) == expected
    assert_same(state_of(engine), state)
    engine.destroy()
    other = make_engine(1)
    other.load_checkpoint(str(folder))
    assert train(other, 2) == pytest.approx(expected, rel=1e-5)
    other.destroy()


@case
def zero_3_into_fsdp2(folder: Path) -> None:
    engine = make_engine(3, SMALL, block=TORCHS)
    train(engine, 2)
    engine.save_checkpoint(str(folder), client_state={"samples": 8})
    saved, frozen = state_of(engine), frozen_of(engine)
    expected = train(engine, 2)[1]
    engine.destroy()
    model, optimizer = sharded()
    with Checkpointer(folder, EXACT) as checkpoints:
        extra = checkpoints.load(model, optimizer)
        assert (extra["samples"], extra["step"]) == (8, 2)
        assert_same(state_of_fsdp(model, optimizer), saved)
        own = dict(model.frozen.named_parameters())
        assert_same({name: p.full_tensor() for name, p in own.items()}, frozen)
        train_fsdp(model, optimizer, 2)
        loss = float(model(tokens_of(3)).detach())
        assert loss == pytest.approx(expected, rel=1e-3)
        checkpoints.save(3, model, optimizer)
    assert [step.name for step in inspect_folder(folder)] == ["global_step2", "step-3"]
    # DeepSpeed has one step counter where torch has one for each parameter, used or not
    engine = make_engine(2)
    parts = "the optimizer's step is", "2 for unused", "load_optimizer_states=False"
    refused(lambda: engine.load_checkpoint(str(folder)), LayoutMismatchError, *parts)
    engine.load_checkpoint(str(folder), load_optimizer_states=False)
    found = {n: t for n, t in state_of_fsdp(model, optimizer).items() if n.startswith("model")}
    masters = {n: p for n, p in engine.module.named_parameters() if f"model.{n}" in found}
    assert_same({f"model.{n}": p.detach() for n, p in masters.items()}, found)
    engine.destroy()


@case
def fsdp2_into_zero_2_and_back(folder: Path) -> None:
    model, optimizer = sharded()
    for step in range(2):
        train_fsdp(model, optimizer, step)
    with Checkpointer(folder, EXACT) as checkpoints:
        checkpoints.save(2, model, optimizer, extra={"samples": 8})
    saved = state_of_fsdp(model, optimizer)
    for key in ("exp_avg", "exp_avg_sq"):  # no gradient has made a state of it there
        saved[f"optimizer.unused.{key}"] = torch.zeros(7)
    saved["optimizer.unused.step"] = torch.tensor(2.0)
    engine = make_engine(2)
    train(engine, 1)  # what it holds gives way
    path, client_state = engine.load_checkpoint(str(folder))
    assert (path, client_state) == (str(folder / "step-2"), {"samples": 8})
    assert (engine.global_steps, engine.global_samples) == (2, 8)
    assert_same(state_of(engine), saved)
    assert_cast(engine, saved)
    loss = float(model(tokens_of(2)).detach())
    assert train(engine, 1) == [pytest.approx(loss, rel=1e-5)]
    engine.save_checkpoint(str(folder))
    saved = state_of(engine)
    engine.destroy()
    steps = [(s.name, s.kind, s.parent) for s in inspect_folder(folder)]
    assert steps == [("step-2", "base", None), ("global_step3", "link", "step-2")]
    model, optimizer = sharded()
    with Checkpointer(folder, EXACT) as checkpoints:
        assert checkpoints.load(model, optimizer)["step"] == 3
    assert_same(state_of_fsdp(model, optimizer), saved)


@case
def deepspeeds_own_checkpoint_comes_in(folder: Path) -> None:
    own = make_engine(2, block={"optimizer": TORCHS["optimizer"]})
    train(own, 2)
    own.save_checkpoint(str(folder), client_state={"epoch": 4})
    saved = state_of(own)
    own.destroy()
    engine = make_engine(2)
    path, client_state = engine.load_checkpoint(str(folder))
    assert path is not None
    assert client_state["epoch"] == 4
    assert_same(state_of(engine), saved)
    kinds = ConfigError if dist.get_rank() == 0 else RankFailedError
    refused(lambda: engine.save_checkpoint(str(folder)), kinds, "does not write")
    train(engine, 1)
    engine.save_checkpoint(str(folder))
    saved = state_of(engine)
    train(engine, 1)
    assert engine.load_checkpoint(str(folder))[0] == str(folder / "global_step3")
    assert_same(state_of(engine), saved)
    assert engine.load_checkpoint(str(folder), tag="global_step2")[1]["epoch"] == 4
    engine.destroy()


@case
def a_run_that_has_not_stepped(folder: Path) -> None:
    engine = make_engine(3)
    engine.save_checkpoint(str(folder))
    expected = train(engine, 2)
    engine.destroy()
    other = make_engine(2)
    train(other, 1)
    other.load_checkpoint(str(folder))
    assert (other.global_steps, other.global_samples) == (0, 0)
    assert train(other, 2) == pytest.approx(expected, rel=1e-5)
    other.destroy()


@case
def loss_scale_and_skipped_steps(folder: Path) -> None:
    engine = make_engine(2, FP16, block=TORCHS)
    train(engine, 1)
    loss = engine(tokens_of(1), scale=1e30)  # one that overflows
    engine.backward(loss)
    engine.step()
    assert engine.skipped_steps == 1
    scaler = dict(vars(engine.optimizer.loss_scaler))
    engine.save_checkpoint(str(folder))
    expected = train(engine, 3)
    engine.destroy()
    other = make_engine(3, FP16, block=TORCHS)
    other.load_checkpoint(str(folder))
    assert (other.global_steps, other.skipped_steps) == (2, 1)
    assert vars(other.optimizer.loss_scaler) == scaler
    assert train(other, 3) == pytest.approx(expected, rel=1e-2)
    other.destroy()


# What a call is told, and what it returns


@case
def tags_and_latest(folder: Path) -> None:
    engine = make_engine(1)
    assert engine.load_checkpoint(str(folder)) == (None, None)
    for step, (tag, latest) in enumerate([(None, True), ("best", False), ("best", True)], start=1):
        train(engine, 1)
        engine.save_checkpoint(str(folder), tag, {"at": step}, save_latest=latest)
        engine.effx.checkpoints.checkpointer(folder).wait()
        dist.barrier()
        named = "best" if step == 3 else "global_step1"
        assert (folder / "latest").read_text() == f"{named}\n"
        assert tags_of(folder) == ({} if step == 1 else {"best": step})
    engine.save_checkpoint(str(folder), "again")  # the same step has one checkpoint
    assert tags_of(folder) == {"again": 3, "best": 3}
    assert engine.load_checkpoint(str(folder)) == (str(folder / "global_step3"), {"at": 3})
    for tag, step in (("best", 3), ("global_step2", 2)):
        path = str(folder / f"global_step{step}")
        assert engine.load_checkpoint(str(folder), tag) == (path, {"at": step})
        assert engine.global_steps == step
    save, load = engine.save_checkpoint, engine.load_checkpoint
    parts = "'bset'", "best", "global_step1"
    refused(lambda: load(str(folder), "bset"), CheckpointNotFoundError, *parts)
    refused(lambda: load(str(folder), "global_step9"), CheckpointNotFoundError)
    refused(lambda: load(str(folder), "a/b"), CheckpointNotFoundError, "'a/b'")
    refused(lambda: save(str(folder), "global_step9"), ConfigError, "another step than 2")
    refused(lambda: save(str(folder), "a/b"), ConfigError, "tag='a/b'")
    refused(lambda: save(""), ValueError, "non-empty")
    engine.destroy()


@case
def parts_of_a_checkpoint(folder: Path) -> None:
    engine = make_engine(3, BF16, block=TORCHS)
    train(engine, 2)
    engine.save_checkpoint(str(folder), client_state={"epoch": 1})
    saved = state_of(engine)
    weights = {name: t for name, t in saved.items() if name.startswith("model.")}
    engine.destroy()
    other = make_engine(2, BF16, block=TORCHS)
    train(other, 1)
    before = {n: t for n, t in state_of(other).items() if n not in weights}
    torch.manual_seed(11)
    _, client_state = other.load_checkpoint(str(folder), load_module_only=True)
    assert torch.initial_seed() == 11
    assert (client_state["epoch"], client_state["global_steps"]) == (1, 2)
    assert (other.global_steps, other.global_samples) == (1, 4)
    assert_same(state_of(other), weights | before)
    assert_cast(other, weights)
    train(other, 1)
    before = {n: t for n, t in state_of(other).items() if n not in weights}
    other.load_checkpoint(str(folder), load_optimizer_states=False)
    assert (other.global_steps, other.global_samples) == (2, 8)
    assert_same(state_of(other), weights | before)
    other.destroy()


@case
def frozen_parameters_left_out(folder: Path) -> None:
    engine = make_engine(2)
    train(engine, 1)
    engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)
    with torch.no_grad():
        engine.module.frozen.bias.fill_(7)
    parts = "model.frozen.bias: not in the checkpoint"
    refused(lambda: engine.load_checkpoint(str(folder)), LayoutMismatchError, parts)
    engine.load_checkpoint(str(folder), load_module_strict=False)
    assert bool((engine.module.frozen.bias == 7).all())
    engine.destroy()


@case
def schedules_and_samplers(folder: Path) -> None:
    infobatch = {"effx": {"infobatch": {"num_epochs": 3}}}
    warmup = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}}
    engine = make_engine(1, infobatch, warmup)
    sampler = engine.effx.make_sampler(20)
    ids = iter(sampler)
    for _ in range(2):
        batch = torch.tensor([next(ids), next(ids)])
        losses = engine(tokens_of(0)).expand(2)
        engine.backward(engine.effx.weigh(losses, batch))
        engine.step()
    rates, left = engine.get_lr(), list(sampler.__class__.__iter__(sampler))
    engine.save_checkpoint(str(folder))
    engine.destroy()
    other = make_engine(2, infobatch, warmup)
    resumed = other.effx.make_sampler(20)
    other.load_checkpoint(str(folder))
    assert other.get_lr() == rates
    assert other.lr_scheduler.last_batch_iteration == engine.lr_scheduler.last_batch_iteration
    assert resumed.progress == sampler.progress
    assert list(resumed) == left
    other.destroy()


@case
def the_schedule_of_an_fsdp2_run(folder: Path) -> None:
    model, optimizer = sharded()
    schedule = ProgressLR(optimizer, 4.0, min_ratio=0.5)
    train_fsdp(model, optimizer, 0)
    schedule.step(2.0)
    with Checkpointer(folder, EXACT) as checkpoints:
        checkpoints.save(1, model, optimizer, stateful={"schedule": schedule})
    engine = make_engine(2)
    engine.lr_scheduler = ProgressLR(engine.basic_optimizer, 4.0, min_ratio=0.5)
    engine.load_checkpoint(str(folder), load_lr_scheduler_states=False)
    assert engine.lr_scheduler.progress == 0
    engine.load_checkpoint(str(folder))
    assert engine.lr_scheduler.progress == 2
    assert engine.get_lr() == [group["lr"] for group in optimizer.param_groups]
    engine.destroy()


# What is refused, on all ranks


@case
def what_cannot_be_kept(folder: Path) -> None:
    engine = make_engine(2)
    rank = dist.get_rank()

    def save(client_state: dict[str, Any]) -> Callable[[], Any]:
        return lambda: engine.save_checkpoint(str(folder), client_state=client_state)

    refused(save({"a": [0, {"b": object()}]}), TypeError, "client_state.a.1.b: a object cannot")
    refused(save({"deepspeed": 1}), ConfigError, "client_state['deepspeed']")
    one_ranks = (TypeError, "client_state.a") if rank == 1 else (RankFailedError, "rank 1")
    refused(save({"a": object() if rank == 1 else 1}), *one_ranks)
    assert not folder.exists()
    engine.save_checkpoint(str(folder), client_state={"a": 1})
    parts = "custom_load_fn", "effx convert"
    load = engine.load_checkpoint
    refused(lambda: load(str(folder), custom_load_fn=lambda **_: None), ConfigError, *parts)
    engine.destroy()


@case
def damaged_and_wrong(folder: Path) -> None:
    engine = make_engine(3)
    train(engine, 1)
    engine.save_checkpoint(str(folder))
    engine.destroy()
    wide = Model()
    wide.norm = nn.Parameter(torch.ones(8))
    wide.extra = nn.Parameter(torch.ones(2))
    other = make_engine(2, model=wide)
    parts = "model.norm: (6,)", "(8,) float32 here", "model.extra: not in the checkpoint"
    refused(lambda: other.load_checkpoint(str(folder)), LayoutMismatchError, *parts)
    other.destroy()
    engine = make_engine(3)
    if dist.get_rank() == 0:
        (folder / "global_step1" / "rank-00001.effx").unlink()
    dist.barrier()
    kinds = (CorruptCheckpointError, RankFailedError)
    refused(lambda: engine.load_checkpoint(str(folder)), kinds, "rank-00001.effx")
    if dist.get_rank() == 0:
        (folder / "global_step1" / "manifest.json").unlink()
    dist.barrier()
    refused(lambda: engine.load_checkpoint(str(folder)), CheckpointNotFoundError, "global_step1")
    engine.destroy()


def run_cases(folder: Path) -> dict[str, str]:
    """The traceback of each case that failed on this rank."""
    be_a_rank()
    logging.getLogger("effx_dist").setLevel(logging.CRITICAL)
    failed = {}
    for name, body in CASES.items():
        try:
            body(folder / name)
        except BaseException:
            failed[name] = traceback.format_exc()
            break  # the other rank may wait for this one: what comes after tells nothing
    return failed


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("cases")
    first, second = spawn(2, run_cases, folder / "ranks", folder)
    return second | first


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, outcome: dict[str, str]) -> None:
    assert name not in outcome, outcome[name]
