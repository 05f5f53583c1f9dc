"""State of other people's objects on real ranks: an averaged copy under FSDP2, torchdata's loader, a model under DDP.

All that needs one number of ranks runs in one spawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from effx_dist.checkpoint import Checkpointer, PerRank, verify_folder
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.storage.steps import step_name
from effx_dist.config import ExcpConfig
from effx_dist.errors import EffxError
from tests.ranks import spawn
from tests.runs import lossless

pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("ignore:.*set_vital.*deprecated")]

NUM_SAMPLES, BATCH, TAKEN = 48, 4, 3


def sharded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 3))
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for p in model.parameters()
    ]


# An averaged copy of the model, as something with a state


def save_average(folder: Path) -> list[torch.Tensor]:
    model, average = sharded(1), sharded(2)
    config = ExcpConfig(profile="lossless", async_mode="thread", base_every=5, keep_latest_k=0)
    with Checkpointer(folder, config) as checkpointer:
        for step in (1, 2):
            with torch.no_grad():
                for parameter in average.parameters():
                    parameter.add_(step)
            checkpointer.save(step, model, stateful={"ema": average, "note": {"n": average}["n"]})
    return whole(average)


def load_average(folder: Path) -> tuple[list[torch.Tensor], list[bool]]:
    model, average = sharded(3), sharded(4)
    before = list(average.parameters())
    with Checkpointer(folder, lossless(async_mode="thread")) as checkpointer:
        checkpointer.load(model, stateful={"ema": average})
    same = [new is old for new, old in zip(average.parameters(), before, strict=True)]
    return whole(average), same


# torchdata's loader


def loader() -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    samples = list(range(NUM_SAMPLES))
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    own = DistributedSampler(samples, world, rank, shuffle=True, seed=5)  # type: ignore[arg-type]
    return StatefulDataLoader(samples, batch_size=BATCH, sampler=own, num_workers=0)


def save_loader(folder: Path) -> dict[str, Any]:
    ours = loader()
    batches = iter(ours)
    taken = [next(batches).tolist() for _ in range(TAKEN + dist.get_rank())]  # at their own speed
    model = nn.Linear(3, 2)
    with Checkpointer(folder, lossless(async_mode="thread")) as checkpointer:
        refused = ""
        try:
            checkpointer.save(1, model, stateful={"loader": ours})
        except EffxError as error:
            refused = str(error)
        checkpointer.save(2, model, stateful={"loader": PerRank(ours)})
    rest = [batch.tolist() for batch in batches]
    return {"taken": taken, "rest": rest, "refused": refused}


def load_loader(folder: Path) -> list[list[int]]:
    ours = loader()
    with Checkpointer(folder, lossless(async_mode="thread")) as checkpointer:
        checkpointer.load(nn.Linear(3, 2), stateful={"loader": PerRank(ours)})
    return [batch.tolist() for batch in ours]


# DDP


def save_replicated(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    inner = nn.Sequential(
        nn.Linear(40, 50), nn.BatchNorm1d(50), nn.Linear(50, 60), nn.Linear(60, 40)
    )
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = ExcpConfig(profile="balanced", async_mode="thread", base_every=5, keep_latest_k=0)
    copied = 0
    with Checkpointer(folder, config) as checkpointer:
        for step in (1, 2, 3):
            torch.manual_seed(10 * step + dist.get_rank())
            model(torch.randn(8, 40)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            checkpointer.save(step, model, optimizer)
        copied = sum(b.nbytes for b in checkpointer._staging._buffers.values())
        resumed = checkpointer.load(model, optimizer)["step"]
        assert resumed == 3
        kind = checkpointer.save(4, model, optimizer).result.kind
    held = sum(p.nbytes for p in inner.parameters()) * 3
    return {
        "copied": copied / held,
        "kind": kind,
        "mean": inner[1].running_mean.clone(),
        "var": inner[1].running_var.clone(),
        "weights": whole(inner),
    }


def on_two_ranks(folder: Path) -> dict[str, Any]:
    return {
        "average": save_average(folder / "average"),
        "again": load_average(folder / "average"),
        "loader": save_loader(folder / "loader"),
        "resumed": load_loader(folder / "loader"),
        "ddp": save_replicated(folder / "ddp"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def ran(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(2, on_two_ranks, tmp_path_factory.mktemp("ranks"), folder)


def test_an_averaged_copy_is_filled_in_place(ran: list[dict[str, Any]], folder: Path) -> None:
    for of_rank in ran:
        got, same = of_rank["again"]
        assert all(same), "the parameters are the ones that were there"
        assert all(map(torch.equal, got, of_rank["average"]))
    assert verify_folder(folder / "average", decode=True).findings == []


@pytest.mark.parametrize("world", [1, 3])
def test_at_another_number_of_ranks(
    ran: list[dict[str, Any]], folder: Path, world: int, tmp_path: Path
) -> None:
    for got, _ in spawn(world, load_average, tmp_path, folder / "average"):
        assert all(map(torch.equal, got, ran[0]["average"]))


def test_into_a_module_that_is_not_sharded(ran: list[dict[str, Any]], folder: Path) -> None:
    got, _ = load_average(folder / "average")
    assert all(map(torch.equal, got, ran[0]["average"]))


def test_a_loader_goes_on_with_its_own_batches(ran: list[dict[str, Any]]) -> None:
    for of_rank in ran:
        assert of_rank["resumed"] == of_rank["loader"]["rest"]
    trained = [i for r in ran for batch in (*r["loader"]["taken"], *r["resumed"]) for i in batch]
    assert sorted(trained) == list(range(NUM_SAMPLES)), "each sample once"


def test_a_loader_that_is_another_on_each_rank_is_refused_as_one(
    ran: list[dict[str, Any]], folder: Path
) -> None:
    for of_rank in ran:
        assert "stateful.loader." in of_rank["loader"]["refused"]
        assert "PerRank" in of_rank["loader"]["refused"]
    assert verify_folder(folder / "loader").num_steps == 1


def test_a_loader_of_two_ranks_is_not_one_ranks(ran: list[dict[str, Any]], folder: Path) -> None:
    with pytest.raises(EffxError, match=r"each of 2 ranks, and 1 load it"):
        load_loader(folder / "loader")


def test_ddp_copies_a_share_on_each_rank(ran: list[dict[str, Any]], folder: Path) -> None:
    shares = [of_rank["ddp"]["copied"] for of_rank in ran]
    assert sum(shares) < 1.5, "not the whole state on every rank"
    assert min(shares) > 0
    assert {of_rank["ddp"]["kind"] for of_rank in ran} == {"link"}
    report = verify_folder(folder / "ddp", decode=True)
    assert (report.findings, report.num_steps) == ([], 4)
    kinds = {
        record.coding.kind
        for name, record in read_manifest(folder / "ddp" / step_name(4))[0].tensors.items()
        if name.endswith("weight") and len(record.shape) == 2
    }
    assert kinds == {"joint_weight"}


def test_buffers_under_ddp_are_those_of_one_rank(ran: list[dict[str, Any]], folder: Path) -> None:
    """The first one's, which DDP hands round; a mean from one rank and a variance from another is neither's."""
    model = nn.Sequential(
        nn.Linear(40, 50), nn.BatchNorm1d(50), nn.Linear(50, 60), nn.Linear(60, 40)
    )
    with Checkpointer(folder / "ddp") as checkpointer:
        checkpointer.load(model, step=3)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    first = ran[0]["ddp"]
    assert torch.equal(norm.running_mean, first["mean"])
    assert torch.equal(norm.running_var, first["var"])
