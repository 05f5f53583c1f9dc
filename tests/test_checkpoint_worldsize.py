"""What a checkpoint decodes to depends neither on the world size that saved it nor on the cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from effx_dist.checkpoint import verify_folder
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.storage.steps import step_name
from effx_dist.config import ExcpConfig
from tests.chain_runs import (
    Cut,
    State,
    Training,
    bits,
    codings,
    flat,
    go_on,
    hybrid,
    quantisers,
    read_whole,
    replicas,
    rows,
    same_bits,
    save_all,
    uneven_rows,
)

LOSSY = ["balanced", "small", "safe", "excp"]
LAYOUTS: list[tuple[int, Cut]] = [
    (2, rows),
    (2, replicas),
    (3, flat),
    (4, uneven_rows),
    (4, hybrid),
    (7, flat),
]


def config(profile: str = "balanced", **settings: object) -> ExcpConfig:
    return ExcpConfig.model_validate({"profile": profile, **settings})


@pytest.fixture(scope="module")
def states() -> list[State]:
    training = Training()
    return [training.advance() for _ in range(5)]


@pytest.fixture(scope="module", params=LOSSY)
def alone(
    request: pytest.FixtureRequest, states: list[State], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One rank's chain; the folder's name is the profile."""
    folder = tmp_path_factory.mktemp("alone") / request.param
    save_all(folder, states, config(request.param, base_every=4))
    return folder


@pytest.mark.parametrize(
    ("size", "cut"), LAYOUTS, ids=lambda value: getattr(value, "__name__", value)
)
def test_every_layout_decodes_to_the_same_bits(
    size: int, cut: Cut, alone: Path, states: list[State], tmp_path: Path
) -> None:
    manifests = save_all(tmp_path, states, config(alone.name, base_every=4), size, cut)
    assert [m.kind for m in manifests] == ["base", "link", "link", "link", "base"]
    for step, found in enumerate(manifests):
        one, _ = read_manifest(alone / step_name(step))
        assert codings(found) == codings(one)
        assert quantisers(found) == quantisers(one)
        same_bits(read_whole(tmp_path, step), read_whole(alone, step))
    assert not verify_folder(tmp_path).findings


@pytest.mark.parametrize("profile", ["balanced", "excp"])
@pytest.mark.parametrize(
    "layouts",
    [((2, rows), (3, flat)), ((3, flat), (1, rows)), ((4, uneven_rows), (2, replicas))],
    ids=["2to3", "3to1", "4to2"],
)
def test_a_chain_goes_on_at_another_world_size_as_if_it_had_not_changed(
    profile: str,
    layouts: tuple[tuple[int, Cut], tuple[int, Cut]],
    states: list[State],
    tmp_path: Path,
) -> None:
    settings = config(profile)
    save_all(tmp_path / "changed", states[:3], settings, *layouts[0])
    go_on(tmp_path / "changed", dict(enumerate(states[3:], start=3)), settings, *layouts[1])
    save_all(tmp_path / "same", states, settings)
    for step in range(len(states)):
        same_bits(read_whole(tmp_path / "changed", step), read_whole(tmp_path / "same", step))
    last, _ = read_manifest(tmp_path / "changed" / step_name(4))
    assert (last.kind, last.figures.saves_since_base) == ("link", 4)
    assert not verify_folder(tmp_path / "changed").findings


@pytest.mark.parametrize("profile", LOSSY)
def test_links_of_a_lossy_profile_are_lossy(
    profile: str, states: list[State], tmp_path: Path
) -> None:
    """Else the tests above would compare exact copies."""
    manifests = save_all(tmp_path, states, config(profile), 3, flat)
    for step, manifest in enumerate(manifests):
        kinds = codings(manifest)
        lossy = {name for name, kind in kinds.items() if kind.startswith("joint")}
        matrices = {name for name, tensor in states[0].items() if tensor.dim() > 1}
        assert lossy == (matrices if step else set())
        assert manifest.figures.error > 0 or not step


@pytest.mark.parametrize("profile", LOSSY)
def test_blocks_do_not_show(profile: str, tmp_path: Path) -> None:
    """A tensor of more than one block, cut so that block edges fall elsewhere."""
    training = Training({"big": (1100, 1000)})
    states = [training.advance(1), training.advance(1)]
    one = save_all(tmp_path / "one", states, config(profile))
    three = save_all(tmp_path / "three", states, config(profile), 3, flat)
    assert len(one[1].tensors["model.big"].chunks[0].blocks) == 2
    assert quantisers(one[1]) == quantisers(three[1])
    same_bits(read_whole(tmp_path / "one", 1), read_whole(tmp_path / "three", 1))


@pytest.mark.parametrize("profile", LOSSY)
def test_a_chain_of_twenty_does_not_drift(profile: str, tmp_path: Path) -> None:
    """Weights walk at random, 5 AdamW steps from save to save; errors are rms over a tensor."""
    training = Training({"a": (120, 64), "b": (64, 96)})
    states = [training.advance() for _ in range(21)]
    save_all(tmp_path, states, config(profile), 2)
    errors = [weight_errors(read_whole(tmp_path, step), states[step]) for step in range(21)]
    assert not errors[0].any()
    assert (errors[20] <= 2 * errors[1]).all(), (errors[1], errors[20])


def weight_errors(found: State, truth: State) -> np.ndarray:
    names = [name for name in truth if name.startswith("model.")]
    return np.array([float((found[n] - truth[n]).square().mean().sqrt()) for n in names])


def test_stated_errors_are_the_true_ones(states: list[State], tmp_path: Path) -> None:
    manifests = save_all(tmp_path, states, config("balanced"), 3, flat)
    for step in range(1, len(states)):
        found = read_whole(tmp_path, step)
        for name, record in manifests[step].tensors.items():
            if record.coding.kind == "joint_weight":
                truth = states[step][name].double()
                true_error = (found[name].double() - truth).norm() / truth.norm()
                assert record.coding.error == pytest.approx(float(true_error), rel=1e-3)


def hostile(dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    """[16, 33] of any bit pattern: NaNs with payloads, infinities, subnormals, both zeros."""
    if dtype == torch.bool:
        return torch.randint(0, 2, (16, 33), generator=random).bool()
    size = (16, 33 * dtype.itemsize)
    return torch.randint(0, 256, size, generator=random, dtype=torch.uint8).view(dtype)


EXACT_DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64),
    *(torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.int32, torch.complex128),
]


def any_bits(seed: int) -> State:
    random = torch.Generator().manual_seed(seed)
    state = {f"model.{dtype}": hostile(dtype, random) for dtype in EXACT_DTYPES}
    state |= {f"model.vector.{dtype}": hostile(dtype, random)[0] for dtype in EXACT_DTYPES}
    state |= {f"model.scalar.{dtype}": hostile(dtype, random)[0, 0] for dtype in EXACT_DTYPES}
    state["optimizer.torch.float32.exp_avg"] = hostile(torch.float32, random)
    state["optimizer.torch.float32.exp_avg_sq"] = hostile(torch.float32, random)
    return state


@pytest.mark.parametrize("profile", ["lossless", "balanced", "excp"])
@pytest.mark.parametrize(("size", "cut"), [(1, rows), (3, flat), (3, replicas)])
def test_every_bit_pattern_of_every_dtype_survives(
    profile: str, size: int, cut: Cut, tmp_path: Path
) -> None:
    """Also in a lossy profile: what is not finite is not quantised."""
    states = [any_bits(seed) for seed in range(3)]
    states.append(states[-1])  # nothing changed
    manifests = save_all(tmp_path, states, config(profile), size, cut)
    assert [m.kind for m in manifests] == ["base", "link", "link", "link"]
    for step, state in enumerate(states):
        same_bits(read_whole(tmp_path, step), dict(sorted(state.items())))


@pytest.mark.parametrize("profile", LOSSY)
@pytest.mark.parametrize(
    "where", ["model.embed", "optimizer.embed.exp_avg", "optimizer.embed.exp_avg_sq"]
)
def test_one_value_that_is_not_finite_keeps_its_joint_exact(
    profile: str, where: str, states: list[State], tmp_path: Path
) -> None:
    """For that save alone, and only for that weight."""
    faulty = {name: tensor.clone() for name, tensor in states[1].items()}
    faulty[where][40, 3] = float("nan")
    saved = [states[0], faulty, *states[2:]]
    manifests = save_all(tmp_path, saved, config(profile), 3, flat)
    found = read_whole(tmp_path, 1)
    joint = ["model.embed", "optimizer.embed.exp_avg", "optimizer.embed.exp_avg_sq"]
    same_bits({n: found[n] for n in joint}, {n: faulty[n] for n in joint})
    assert codings(manifests[1])["model.wide"] == "joint_weight"
    after = read_whole(tmp_path, 2)
    assert all(tensor.isfinite().all() for tensor in after.values())
    if where != "model.embed":
        assert codings(manifests[2])["model.embed"] == "joint_weight"


@pytest.mark.parametrize("profile", LOSSY)
def test_a_residual_that_overflows_stays_exact(
    profile: str, states: list[State], tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in states[0].items()}
    now = {name: tensor.clone() for name, tensor in states[1].items()}
    before["model.embed"][0, 0], now["model.embed"][0, 0] = -3e38, 3e38
    save_all(tmp_path, [before, now], config(profile), 2)
    found = read_whole(tmp_path, 1)["model.embed"]
    assert np.array_equal(bits(found), bits(now["model.embed"]))


def test_max_error_makes_exactly_the_worse_tensors_lossless(
    states: list[State], tmp_path: Path
) -> None:
    free = save_all(tmp_path / "free", states[:2], config("small"), 3, flat)[1]
    errors = {
        name: record.coding.error
        for name, record in free.tensors.items()
        if record.coding.kind == "joint_weight"
    }
    bound = sorted(errors.values())[len(errors) // 2]
    settings = config("small", max_error=bound)
    bounded = save_all(tmp_path / "bounded", states[:2], settings, 3, flat)[1]
    kinds, found = codings(bounded), read_whole(tmp_path / "bounded", 1)
    assert bounded.figures.error <= bound
    for name, error in errors.items():
        assert kinds[name] == ("joint_weight" if error <= bound else "delta")
        if error > bound:
            for exact in (name, f"optimizer{name[5:]}.exp_avg", f"optimizer{name[5:]}.exp_avg_sq"):
                assert np.array_equal(bits(found[exact]), bits(states[1][exact]))


def test_max_error_below_all_errors_is_lossless(states: list[State], tmp_path: Path) -> None:
    settings = config("balanced", max_error=1e-12)
    manifests = save_all(tmp_path, states, settings, 4, hybrid)
    for step, state in enumerate(states):
        same_bits(read_whole(tmp_path, step), dict(sorted(state.items())))
    assert all(manifest.figures.error == 0 for manifest in manifests)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_dtypes_with_fp32_moments(dtype: torch.dtype, tmp_path: Path) -> None:
    training = Training({"a": (40, 33)})
    states = [training.advance() for _ in range(4)]
    for state in states:
        state["model.a"] = state["model.a"].to(dtype)
    one = save_all(tmp_path / "one", states, config())
    three = save_all(tmp_path / "three", states, config(), 3, flat)
    assert quantisers(one[3]) == quantisers(three[3])
    assert quantisers(one[3])
    same_bits(read_whole(tmp_path / "one", 3), read_whole(tmp_path / "three", 3))
