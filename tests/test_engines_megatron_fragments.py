"""At every layout of Megatron's, the pieces of all ranks are each whole tensor, once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.megatron_processes import call, needs_megatron
from tests.ranks import spawn

pytestmark = [pytest.mark.ranks, pytest.mark.megatron, needs_megatron]

WORLD = 4
USUAL = ["dp4, overlap", "tp2 dp2", "pp2 tp2, tied", "ep2 tp2"]
Results = list[dict[str, dict[str, Any]]]


def check_all(ranks: Results) -> None:
    for case, found in ranks[0].items():
        assert found["names"], case
        for of_rank in ranks:
            assert of_rank[case]["known_tensors"] == found["known_tensors"], case
            assert of_rank[case]["wrong_sums"] == [], case
        assert found["times"] == {name: {found["copies"]} for name in found["names"]}, case
        assert found["wrong_values"] == [], case


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("fragments")
    return spawn(WORLD, call, folder, "megatron_fragment_runs", "everything", USUAL)


class TestUsualLayouts:
    def test_pieces_tile_each_whole_once(self, ranks: Results) -> None:
        assert list(ranks[0]) == USUAL
        check_all(ranks)

    def test_names_and_shapes_are_those_of_one_process(self, ranks: Results) -> None:
        dense = ranks[0]["dp4, overlap"]["shapes"]
        assert dense["decoder.layers.1.self_attention.linear_qkv.weight"] == (64, 32)
        assert dense["decoder.layers.1.mlp.linear_fc1.weight"] == (96, 32)
        assert dense["decoder.layers.0.self_attention.linear_proj.weight"] == (32, 32)
        assert ranks[0]["tp2 dp2"]["shapes"] == dense
        tied = ranks[0]["pp2 tp2, tied"]["shapes"]
        assert tied == {name: s for name, s in dense.items() if name != "output_layer.weight"}

    def test_experts_are_tensors_of_their_own(self, ranks: Results) -> None:
        shapes = ranks[0]["ep2 tp2"]["shapes"]
        experts = {name: shape for name, shape in shapes.items() if ".experts." in name}
        assert sorted(set(experts.values())) == [(32, 24), (48, 32)]
        assert len(experts) == 2 * 4 * 2, "layers, experts, matrices"


@pytest.mark.slow
def test_pieces_tile_each_whole_once_at_every_other_layout(tmp_path: Any) -> None:
    ranks = spawn(WORLD, call, tmp_path, "megatron_fragment_runs", "everything_but", USUAL)
    check_all(ranks)
