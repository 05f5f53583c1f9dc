"""What people do with DeepSpeed beside a single engine that trains: plain DeepSpeed with our wrapper, a second engine,
actor and critic, reference models, a folder for every save, a first start that was killed.

All cases of ranks run in one spawn of 2.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from effx_dist.checkpoint import verify_folder
from effx_dist.engines import build_locks
from effx_dist.engines.build_locks import BuildLockError, await_builds, is_stale, locks
from effx_dist.errors import EffxError
from effx_dist.optim import CautiousAdamW, cautious
from launch.ranks import free_port
from tests.deepspeed_checkpoint_runs import LOSSLESS, assert_same, make_engine, state_of, train
from tests.deepspeed_runs import BASE, Model, be_a_rank, merged, needs_deepspeed, tokens_of
from tests.ranks import spawn

pytestmark = [pytest.mark.deepspeed, needs_deepspeed]
ROOT = Path(__file__).parents[1]

Case = Callable[[Path], Any]
CASES: dict[str, Case] = {}


def case(body: Case) -> Case:
    CASES[body.__name__] = body
    return body


# Plain DeepSpeed, with an optimizer that was made cautious


def plain_step(stage: int, make: Callable[[Any], torch.optim.Optimizer]) -> tuple[str, bool]:
    """A step of DeepSpeed's own engine: what it raises, and whether any parameter has moved."""
    import deepspeed

    model = Model()
    trained = [p for p in model.parameters() if p.requires_grad]
    config = merged(
        BASE, {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    )
    engine = deepspeed.initialize(model=model, optimizer=make(trained), config=config)[0]
    before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    message = ""
    try:
        engine.backward(engine(tokens_of(0)))
        engine.step()
    except EffxError as error:
        message = f"{type(error).__name__}: {error}"
    moved = any(not torch.equal(before[n], p) for n, p in engine.module.named_parameters())
    engine.destroy()
    return message, moved


@case
def under_plain_deepspeed(_: Path) -> Any:
    found = {}
    for stage in (1, 2, 3):
        found[stage, "wrapped"] = plain_step(
            stage, lambda p: cautious(torch.optim.NAdam(p, lr=0.1))
        )
        found[stage, "ours"] = plain_step(stage, lambda p: CautiousAdamW(p, lr=0.1))
    return found


# A second engine


@case
def a_second_engine(folder: Path) -> None:
    """DeepSpeed's own test pattern: made, saved, made again, loaded; nobody waits for the save by hand."""
    block = merged(LOSSLESS, {"effx": {"excp": {"async_mode": "thread"}}})
    first = make_engine(2, block=block)
    train(first, 2)
    assert first.save_checkpoint(str(folder), client_state={"note": 1}) is True
    second = make_engine(2, block=block)
    path, client = second.load_checkpoint(str(folder))
    assert path == str(folder / "global_step2")
    assert client == {"note": 1}
    assert_same(state_of(second), state_of(first))
    for engine in (first, second):
        engine.destroy()


@case
def actor_and_critic(folder: Path) -> None:
    """Two engines, one folder, the same step, a tag each; and again after a restart."""
    actor, critic = make_engine(2, block=LOSSLESS), make_engine(1, block=LOSSLESS)
    train(actor, 1)
    train(critic, 1)
    with torch.no_grad():
        critic.basic_optimizer.param_groups[0]["lr"] = 0.5
    for round_ in range(2):
        for engine, tag in ((actor, "actor"), (critic, "critic")):
            if round_:
                train(engine, 1)
            assert engine.save_checkpoint(str(folder), tag=tag) is True
    expected = [state_of(engine) for engine in (actor, critic)]
    for engine in (actor, critic):
        engine.destroy()
    critic, actor = make_engine(2, block=LOSSLESS), make_engine(1, block=LOSSLESS)
    for engine, tag, state in ((critic, "critic", expected[1]), (actor, "actor", expected[0])):
        path, _ = engine.load_checkpoint(str(folder), tag=tag)
        assert path is not None
        assert_same(state_of(engine), state)
        train(engine, 1)
        assert engine.save_checkpoint(str(folder), tag=tag) is True
    for engine in (critic, actor):
        engine.destroy()
    assert verify_folder(folder).findings == []
    assert verify_folder(folder / "critic").findings == []


@case
def a_reference_model(_: Path) -> None:
    """No optimizer: nothing to make cautious, and it computes."""
    from effx_dist.engines import deepspeed

    config = merged(BASE, {"zero_optimization": {"stage": 0}, "effx": {"cautious": {}}})
    engine, *_ = deepspeed.initialize(model=Model(), config=config)
    assert torch.isfinite(engine(tokens_of(0)))
    assert engine.effx.alignment == {}
    engine.destroy()


@case
def odd_arguments(folder: Path) -> None:
    engine = make_engine(2, block=LOSSLESS)
    train(engine, 1)
    for nothing in (None, ""):
        with pytest.raises(ValueError, match="save_dir must be a non-empty string, got"):
            engine.save_checkpoint(nothing)
    arguments = argparse.Namespace(lr=0.1, names=["a"], nested=argparse.Namespace(x=(1, 2)))
    engine.save_checkpoint(str(folder), client_state={"args": arguments})
    _, client = engine.load_checkpoint(str(folder))
    assert client == {"args": arguments}
    with pytest.raises(TypeError, match=r"client_state.args.model: a Linear cannot be kept"):
        engine.save_checkpoint(
            str(folder), client_state={"args": argparse.Namespace(model=torch.nn.Linear(1, 1))}
        )
    engine.destroy()


@case
def an_evaluation(_: Path) -> None:
    """Losses that are weighed under no_grad are not trained on."""
    from effx_dist.engines import deepspeed

    block = {"effx": {"infobatch": {"num_epochs": 3, "score": "loss"}}}
    config = merged(BASE, {"zero_optimization": {"stage": 1}}, block)
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.01}}
    data = [torch.arange(5) + i for i in range(32)]
    engine, _, loader, _ = deepspeed.initialize(model=Model(), training_data=data, config=config)
    batch = next(iter(loader))
    sampler = engine.effx.sampler
    with torch.no_grad():
        mean = engine.effx.weigh(torch.tensor([1.0, 3.0]), batch)
    assert float(mean) == 2
    assert sampler.position == 0
    engine.effx.weigh(torch.tensor([1.0, 3.0]), batch)
    assert sampler.position == 4
    engine.destroy()


@case
def a_folder_for_every_save(folder: Path) -> None:
    block = merged(LOSSLESS, {"effx": {"excp": {"async_mode": "thread"}}})
    engine = make_engine(2, block=block)
    threads = []
    for number in range(6):
        train(engine, 1)
        made = folder / f"checkpoint-{number}"
        assert engine.save_checkpoint(str(made)) is True
        engine.effx.checkpoints.checkpointer(made).wait()  # a save at work has threads of its own
        threads.append(threading.active_count())
    assert len(engine.effx.checkpoints._by_folder._made) == 2
    assert threads[-1] <= threads[1]
    engine.destroy()
    for number in range(6):
        assert verify_folder(folder / f"checkpoint-{number}").num_steps == 1


def run_cases(folder: Path) -> dict[str, Any]:
    be_a_rank()
    found: dict[str, Any] = {}
    for name, body in CASES.items():
        try:
            found[name] = body(folder / name)
        except Exception:
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(2, run_cases, tmp_path_factory.mktemp("ranks"), tmp_path_factory.mktemp("runs"))


@pytest.mark.ranks
@pytest.mark.parametrize("name", [n for n in CASES if n != "under_plain_deepspeed"])
def test_case(ran: list[dict[str, Any]], name: str) -> None:
    for of_rank in ran:
        assert of_rank[name] is None, of_rank[name]


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", ["wrapped", "ours"])
def test_partitions_are_not_taken_for_parameters(
    ran: list[dict[str, Any]], stage: int, kind: str
) -> None:
    for of_rank in ran:
        assert isinstance(of_rank["under_plain_deepspeed"], dict), of_rank["under_plain_deepspeed"]
        message, moved = of_rank["under_plain_deepspeed"][stage, kind]
        assert message.startswith("LayoutMismatchError")
        assert "effx_dist.deepspeed.initialize" in message
        assert not moved


# The module by its public name


def test_the_module_by_its_public_name() -> None:
    source = """
import effx_dist.deepspeed as one
from effx_dist import deepspeed as other
import effx_dist, deepspeed, effx_dist.engines.deepspeed as adapter
assert one is other is effx_dist.deepspeed is adapter
assert one.__version__ == deepspeed.__version__
assert one.zero is deepspeed.zero
"""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


# Locks of builds


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def lock_in(root: Path, name: str = "deepspeed_shm_comm") -> Path:
    lock = root / name / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    return lock


class TestLocks:
    def test_one_that_a_killed_build_left_is_taken_over(
        self, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        lock = lock_in(root)
        hour_ago = time.time() - 3600
        os.utime(lock, (hour_ago, hour_ago))
        await_builds()
        assert not lock.exists()
        assert [str(lock) in r.message and "removed" in r.message for r in caplog.records] == [True]

    def test_one_that_is_held_is_waited_for(
        self, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As torch's builder holds it: open."""
        lock = lock_in(root)
        waited: list[float] = []
        with lock.open() as held:

            def sleep(seconds: float) -> None:
                waited.append(seconds)
                assert not is_stale(lock)
                if len(waited) == 3:
                    held.close()
                    lock.unlink()

            await_builds(sleep=sleep)
        assert len(waited) == 3
        assert ["waiting for a build" in r.message for r in caplog.records] == [True]

    def test_the_wait_is_bounded_and_names_the_file(self, root: Path) -> None:
        lock = lock_in(root)
        with lock.open(), pytest.raises(BuildLockError, match=r"remove the file") as caught:
            await_builds(timeout_s=0.05, sleep=lambda _: None)
        assert str(lock) in str(caught.value)
        assert lock.exists()

    def test_of_whom_this_process_cannot_see_it_waits_a_minute(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(build_locks, "_sees_all_processes", lambda lock: False)
        lock = lock_in(root)
        assert not is_stale(lock)
        old = time.time() - 2 * build_locks.IDLE_S
        for path in (lock, lock.parent):
            os.utime(path, (old, old))
        assert is_stale(lock)
        (lock.parent / "shm.o").touch()
        assert not is_stale(lock), "somebody is writing"

    def test_others_are_left_alone(self, root: Path) -> None:
        lock = lock_in(root, "somebody_elses")
        await_builds(lambda operator: operator == "cpu_adam")
        assert lock.exists()
        assert locks(lambda operator: operator == "somebody_elses") == [lock]

    def test_two_ranks_take_turns(self, root: Path) -> None:
        """The second finds a build that the first has begun in between, and leaves its lock."""
        lock = lock_in(root)
        assert build_locks._take_over(lock)
        with lock.open("w"):
            assert not build_locks._take_over(lock)
            assert lock.exists()


KILLED = """
import os, sys
from pathlib import Path
lock = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "deepspeed_shm_comm" / "lock"
lock.parent.mkdir(parents=True)
descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)  # as torch's FileBaton takes it
os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_a_start_after_a_killed_one(root: Path) -> None:
    """The operator is compiled anew, which takes a minute."""
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(root), "DS_ACCELERATOR": "cpu"}
    killed = subprocess.run([sys.executable, "-c", KILLED], env=environment, check=False)
    assert killed.returncode == -9
    lock = root / "deepspeed_shm_comm" / "lock"
    assert lock.exists()
    source = (
        "from effx_dist import deepspeed\n"
        "deepspeed.init_distributed(dist_backend='gloo', rank=0, world_size=1, auto_mpi_discovery=False)\n"
        "print('started')\n"
    )
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", source],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=280,
    )
    assert "started" in done.stdout, done.stderr[-2000:]
    assert f"{lock}: was left behind" in done.stderr
    assert not lock.exists()
