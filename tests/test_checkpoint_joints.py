"""Moments find their weight by name, shape and dtype, and none rather than a wrong one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.checkpoint.state.joints import Joint, TensorFacts, find_joints, is_chained, is_moment

F32 = torch.float32
W = TensorFacts(F32, (4, 3))


def adam(stem: str, facts: TensorFacts = W) -> dict[str, TensorFacts]:
    scalar = TensorFacts(F32, ())
    return {f"{stem}.exp_avg": facts, f"{stem}.exp_avg_sq": facts, f"{stem}.step": scalar}


@pytest.mark.parametrize(
    ("weight", "stem"),
    [
        ("model.layers.0.w", "optimizer.layers.0.w"),
        ("model.layers.0.w", "optim.state.layers.0.w"),
        ("model.layers.0.w", "optimizer.model.layers.0.w"),
        ("layers.0.w", "optimizer.state.layers.0.w"),
        ("layers.0.w", "layers.0.w"),
        ("w", "w"),
        ("w", "optimizer.w"),
        ("model.w", "w"),
        ("module.w", "state.w"),
    ],
)
def test_moments_belong_to_the_weight_whose_name_theirs_ends_in(weight: str, stem: str) -> None:
    found = find_joints({weight: W, **adam(stem)})
    assert found == (Joint(weight, f"{stem}.exp_avg", f"{stem}.exp_avg_sq"),)
    assert found[0].names == (weight, f"{stem}.exp_avg", f"{stem}.exp_avg_sq")


def test_the_longest_name_wins() -> None:
    tensors = {"model.w": W, "model.block.w": W, **adam("optimizer.block.w"), **adam("optimizer.w")}
    assert {j.weight: j.exp_avg for j in find_joints(tensors)} == {
        "model.w": "optimizer.w.exp_avg",
        "model.block.w": "optimizer.block.w.exp_avg",
    }


def test_a_weight_without_moments_takes_no_one_elses() -> None:
    """model.block.w has no state of its own; optimizer.other.block.w's may not be given to it."""
    tensors = {"model.block.w": W, "model.other.block.w": W, **adam("optimizer.other.block.w")}
    assert [j.weight for j in find_joints(tensors)] == ["model.other.block.w"]


@pytest.mark.parametrize("names", [("model.w", "ema.w"), ("a.x.w", "b.x.w")])
def test_names_that_fit_equally_well_give_no_joint(names: tuple[str, str]) -> None:
    stem = "optimizer." + names[0].partition(".")[2]
    assert find_joints({**dict.fromkeys(names, W), **adam(stem)}) == ()


def test_a_component_is_matched_whole() -> None:
    assert find_joints({"model.w": W, **adam("optimizer.ww")}) == ()
    assert find_joints({"model.layer.1.w": W, **adam("optimizer.layer.11.w")}) == ()


@pytest.mark.parametrize(
    "weight",
    [
        TensorFacts(F32, (4, 4)),
        TensorFacts(F32, (3, 4)),
        TensorFacts(F32, (12,)),
        TensorFacts(torch.int64, (4, 3)),
        TensorFacts(torch.complex64, (4, 3)),
    ],
)
def test_a_weight_of_another_shape_or_kind_gives_no_joint(weight: TensorFacts) -> None:
    assert find_joints({"model.w": weight, **adam("optimizer.w")}) == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32])
def test_a_first_moment_that_is_not_fp32_gives_no_joint(dtype: torch.dtype) -> None:
    assert find_joints({"model.w": W, **adam("optimizer.w", TensorFacts(dtype, (4, 3)))}) == ()


def test_a_bf16_weight_with_fp32_moments_is_a_joint() -> None:
    tensors = {"model.w": TensorFacts(torch.bfloat16, (4, 3)), **adam("optimizer.w")}
    assert [joint.weight for joint in find_joints(tensors)] == ["model.w"]


@pytest.mark.parametrize(
    "second", [None, TensorFacts(F32, (4, 4)), TensorFacts(torch.bfloat16, (4, 3))]
)
def test_a_second_moment_that_does_not_fit_is_left_out(second: TensorFacts | None) -> None:
    tensors = {"model.w": W, "optimizer.w.exp_avg": W}
    if second is not None:
        tensors["optimizer.w.exp_avg_sq"] = second
    [joint] = find_joints(tensors)
    assert joint.exp_avg_sq is None
    assert joint.names == ("model.w", "optimizer.w.exp_avg")


def test_a_second_moment_alone_is_in_no_joint() -> None:
    assert find_joints({"model.w": W, "optimizer.w.exp_avg_sq": W}) == ()


def test_two_optimizers_of_one_weight_give_it_one_pair() -> None:
    [joint] = find_joints({"model.w": W, **adam("first.w"), **adam("second.w")})
    assert joint.exp_avg_sq == joint.exp_avg + "_sq"


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "expected"),
    [
        ("model.w", F32, (4, 3), True),
        ("model.w", torch.bfloat16, (2, 2, 2), True),
        ("model.norm", F32, (4,), False),
        ("model.scale", F32, (), False),
        ("model.ids", torch.int64, (4, 3), False),
        ("optimizer.w.exp_avg", F32, (4, 3), False),
        ("optimizer.w.exp_avg_sq", F32, (4, 3), False),
    ],
)
def test_weights_of_two_dimensions_or_more_are_chained(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], expected: bool
) -> None:
    assert is_chained(name, TensorFacts(dtype, shape)) == expected


def test_moments_are_told_by_the_last_component() -> None:
    assert is_moment("optimizer.w.exp_avg")
    assert is_moment("optimizer.w.exp_avg_sq")
    assert not is_moment("model.exp_avg.w")
    assert not is_moment("model.my_exp_avg")


NAMES = st.lists(st.sampled_from(["a", "b", "w", "0"]), min_size=1, max_size=3).map(".".join)
FACTS = st.sampled_from([W, TensorFacts(F32, (3, 4)), TensorFacts(torch.bfloat16, (4, 3))])
STATES = NAMES.flatmap(lambda n: st.sampled_from([n, f"{n}.exp_avg", f"{n}.exp_avg_sq"]))


@given(st.dictionaries(STATES, FACTS, max_size=12), st.randoms(use_true_random=False))
def test_no_tensor_is_in_two_joints_and_order_does_not_matter(tensors, random) -> None:  # type: ignore[no-untyped-def]
    found = find_joints(tensors)
    names = [name for joint in found for name in joint.names]
    assert len(names) == len(set(names))
    for joint in found:
        assert is_chained(joint.weight, tensors[joint.weight])
        assert {tensors[name].shape for name in joint.names} == {tensors[joint.weight].shape}
    items = list(tensors.items())
    random.shuffle(items)
    assert find_joints(dict(items)) == found
