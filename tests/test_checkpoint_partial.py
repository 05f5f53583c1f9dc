"""Loading a part of a checkpoint, or under other names; and the saves that follow."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from effx_dist.checkpoint import Checkpointer, verify_folder
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.storage.steps import step_name
from effx_dist.errors import CorruptCheckpointError, LayoutMismatchError
from effx_dist.shard import Group
from tests.chain_runs import read_whole, same_bits
from tests.runs import Run, lossless, small_model, two_groups
from tests.thread_ranks import run_ranks

State = dict[str, torch.Tensor]


def with_a_head() -> nn.Module:
    """The small model, and a layer that its checkpoints lack."""
    return nn.Sequential(*small_model(), nn.Linear(4, 3))


class Adapted(nn.Linear):
    """A frozen linear layer with a low-rank update beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.ones(2, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, 2))


def adapted() -> nn.Module:
    """The small model as adapters wrap it: its names get a prefix, and there are new ones."""
    wrapper = nn.Module()
    wrapper.base_model = small_model()
    wrapper.base_model[0] = Adapted(nn.Linear(12, 16))
    return wrapper


def unwrapped(name: str) -> str | None:
    return None if "lora" in name else name.removeprefix("base_model.")


def saved(folder: Path, num_steps: int = 2, **options: object) -> Run:
    """A run of the small model that saved once, as step 1."""
    run = Run(**options)  # type: ignore[arg-type]
    run.train(num_steps)
    with Checkpointer(folder, lossless()) as checkpointer:
        checkpointer.save(1, run.model, run.optimizer)
    return run


def renamed(state: State, rename: Callable[[str], str | None]) -> State:
    """``state`` as a model whose names ``rename`` maps to the saved ones would have it."""
    found = {}
    for name in state:
        part, _, rest = name.partition(".")
        if (there := rename(rest)) is not None:
            found[f"{part}.{there}"] = state[name]
    return found


class TestStrictFalse:
    def test_what_both_sides_have_is_loaded_and_the_rest_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        run, other = saved(tmp_path), Run(with_a_head, seed=9)
        other.train(1)
        before = other.state()
        with Checkpointer(tmp_path, lossless()) as checkpointer:
            with caplog.at_level(logging.WARNING, "effx_dist"):
                checkpointer.load(other.model, other.optimizer, strict=False)
            report = checkpointer.last_load
        assert report is not None
        assert report.missing == ("model.3.bias", "model.3.weight")
        assert report.unexpected == ()
        assert "model.3.weight" in caplog.text
        new = {name: tensor for name, tensor in before.items() if ".3." in name}
        assert new.keys() > set(report.missing), "its moments are kept as well"
        same_bits(other.state(), {**run.state(), **new})

    def test_a_fresh_optimizer_stays_fresh_for_what_the_checkpoint_lacks(
        self, tmp_path: Path
    ) -> None:
        saved(tmp_path)
        other = Run(with_a_head)
        with Checkpointer(tmp_path, lossless()) as checkpointer:
            checkpointer.load(other.model, other.optimizer, strict=False)
        assert [bool(other.optimizer.state[p]) for p in other.model[3].parameters()] == [False] * 2
        assert all(other.optimizer.state[p] for p in other.model[0].parameters())
        other.train(1)

    def test_what_only_the_checkpoint_has_is_left_out(self, tmp_path: Path) -> None:
        run = saved(tmp_path, make_model=with_a_head)
        other = Run()
        with Checkpointer(tmp_path, lossless()) as checkpointer:
            checkpointer.load(other.model, other.optimizer, strict=False)
            report = checkpointer.last_load
        assert report is not None
        assert report.missing == ()
        assert set(report.unexpected) == {name for name in run.state() if ".3." in name}
        same_bits(other.state(), {n: t for n, t in run.state().items() if ".3." not in n})

    @pytest.mark.parametrize("strict", [True, False])
    def test_another_dtype_is_never_cast(self, strict: bool, tmp_path: Path) -> None:
        saved(tmp_path)
        model = small_model().to(torch.bfloat16)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with (
            Checkpointer(tmp_path, lossless()) as checkpointer,
            pytest.raises(LayoutMismatchError, match="load into float32, then convert"),
        ):
            checkpointer.load(model, strict=strict)
        same_bits(dict(model.state_dict()), before)

    def test_other_parameter_groups_keep_their_options(self, tmp_path: Path) -> None:
        run, other = saved(tmp_path, lr=0.5), Run(make_optimizer=two_groups, lr=0.25)
        with Checkpointer(tmp_path, lossless()) as checkpointer:
            checkpointer.load(other.model, other.optimizer, strict=False)
        assert other.optimizer.param_groups[0]["lr"] == 0.25
        same_bits(other.state(), run.state())

    def test_the_random_states_of_another_run_stay_out(self, tmp_path: Path) -> None:
        saved(tmp_path)
        with Checkpointer(tmp_path, lossless()) as checkpointer:
            model = small_model()
            torch.manual_seed(5)
            before = torch.get_rng_state()
            checkpointer.load(model, strict=False)
            assert torch.equal(torch.get_rng_state(), before)
            checkpointer.load(model)
            assert not torch.equal(torch.get_rng_state(), before)


def damage_moments(folder: Path) -> int:
    """Change a byte of every stored block of the optimizer's; how many there were."""
    manifest, _ = read_manifest(folder)
    blocks = [
        (manifest.files[chunk.file].name, block.offset)
        for name, record in manifest.tensors.items()
        if name.startswith("optimizer.")
        for chunk in record.chunks
        for block in chunk.blocks
    ]
    for name, offset in blocks:
        content = bytearray((folder / name).read_bytes())
        content[offset] ^= 1
        (folder / name).write_bytes(content)
    return len(blocks)


class TestWeightsOnly:
    def test_they_come_without_an_optimizer(self, tmp_path: Path) -> None:
        run = saved(tmp_path)
        other = Run(seed=4)
        with Checkpointer(tmp_path, lossless()) as checkpointer:
            checkpointer.load(other.model)
        same_bits(dict(other.model.state_dict()), dict(run.model.state_dict()))
        assert not other.optimizer.state

    def test_the_moments_are_not_read(self, tmp_path: Path) -> None:
        run, other = saved(tmp_path), Run(seed=4)
        assert damage_moments(tmp_path / step_name(1))
        with Checkpointer(tmp_path, lossless()) as checkpointer:
            checkpointer.load(other.model)
            with pytest.raises(CorruptCheckpointError):
                checkpointer.load(other.model, other.optimizer)
        same_bits(dict(other.model.state_dict()), dict(run.model.state_dict()))

    def test_a_strict_load_wants_the_optimizer_that_it_was_given(self, tmp_path: Path) -> None:
        run, other = Run(), Run(seed=3)
        with Checkpointer(tmp_path, lossless()) as checkpointer:
            checkpointer.save(1, run.model)
            with pytest.raises(LayoutMismatchError, match="saved without an optimizer"):
                checkpointer.load(other.model, other.optimizer)
            checkpointer.load(other.model, other.optimizer, strict=False)
        same_bits(other.state(), run.state())


class TestMapping:
    def test_an_adapted_model_takes_its_base_weights(self, tmp_path: Path) -> None:
        run, wrapper = saved(tmp_path), adapted()
        with Checkpointer(tmp_path, lossless()) as checkpointer:
            checkpointer.load(wrapper, mapping=unwrapped)
            assert checkpointer.last_load is not None
            assert checkpointer.last_load.missing == checkpointer.last_load.unexpected == ()
        base = {f"model.{n}": t for n, t in wrapper.state_dict().items()}
        expected = {f"model.{n}": t for n, t in run.model.state_dict().items()}
        same_bits(renamed(base, unwrapped), expected)
        assert wrapper.base_model[0].lora_a.eq(1).all()

    def test_the_optimizer_follows_the_mapping(self, tmp_path: Path) -> None:
        run = saved(tmp_path)

        def in_a_module() -> nn.Module:
            return nn.ModuleDict({"net": small_model()})

        def rename(name: str) -> str:
            return name.removeprefix("net.")

        other = Run(in_a_module, seed=5)
        with Checkpointer(tmp_path, lossless()) as checkpointer:
            checkpointer.load(other.model, other.optimizer, mapping=rename)
        same_bits(renamed(other.state(), rename), run.state())
        run.train(2, seed=8)
        other.train(2, seed=8)
        same_bits(renamed(other.state(), rename), run.state())

    def test_a_frozen_subset_has_no_state(self, tmp_path: Path) -> None:
        run, other = saved(tmp_path), Run(seed=2)
        frozen = other.model[0].requires_grad_(False)
        other.optimizer = torch.optim.AdamW(p for p in other.model.parameters() if p.requires_grad)
        with Checkpointer(tmp_path, lossless()) as checkpointer:
            with pytest.raises(LayoutMismatchError, match=r"optimizer\.0\.\w+\.\w+: only in the"):
                checkpointer.load(other.model, other.optimizer)
            checkpointer.load(other.model, other.optimizer, strict=False)
        expected = {n: t for n, t in run.state().items() if not n.startswith("optimizer.0.")}
        same_bits(other.state(), expected)
        assert not any(parameter in other.optimizer.state for parameter in frozen.parameters())

    def test_a_name_mapped_to_none_is_left_as_it_is_and_not_missed(self, tmp_path: Path) -> None:
        run = saved(tmp_path)
        other = nn.Sequential(*small_model()[:2], nn.Linear(16, 7, bias=False))
        head = other[2].weight.detach().clone()
        with Checkpointer(tmp_path, lossless()) as checkpointer:
            checkpointer.load(other, mapping={"2.weight": None})
        assert torch.equal(other[2].weight, head)
        assert torch.equal(other[0].weight, run.model[0].weight)

    @pytest.mark.parametrize(
        ("mapping", "strict", "message"),
        [
            (
                {"0.weight": "0.wieght"},
                False,
                r"0\.weight: mapped to 0\.wieght, which is not in the .*nearest: 0\.weight",
            ),
            ({"0.wieght": "0.weight"}, True, r"0\.wieght: not in the model \(nearest: 0\.weight"),
            (lambda name: f"other.{name}", False, r"0\.bias: mapped to other\.0\.bias, which"),
            (
                lambda name: name.replace("weight", "wight"),
                True,
                r"0\.weight: not in the checkpoint, where .* model\.0\.wight \(nearest: model\.0\.w",
            ),
            (
                {"0.weight": "2.weight"},
                True,
                r"model\.0\.weight and model\.2\.weight|model\.2\.weight and model\.0\.weight",
            ),
        ],
    )
    def test_a_mapping_that_leads_nowhere_names_what_it_may_have_meant(
        self, mapping: object, strict: bool, message: str, tmp_path: Path
    ) -> None:
        saved(tmp_path)
        model = small_model()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with (
            Checkpointer(tmp_path, lossless()) as checkpointer,
            pytest.raises(LayoutMismatchError, match=message),
        ):
            checkpointer.load(model, mapping=mapping, strict=strict)  # type: ignore[arg-type]
        same_bits(dict(model.state_dict()), before)

    def test_a_misspelt_layer_is_told_with_its_nearest_name(self, tmp_path: Path) -> None:
        run = Run(lambda: nn.ModuleDict({"encoder": nn.Linear(3, 4)}))
        other = Run(lambda: nn.ModuleDict({"encodre": nn.Linear(3, 4)}))
        with Checkpointer(tmp_path, lossless()) as checkpointer:
            checkpointer.save(1, run.model)
            with pytest.raises(LayoutMismatchError, match=r"nearest: .*model\.encoder\.bias"):
                checkpointer.load(other.model)


def twins() -> nn.Module:
    """Two layers of one shape, which a mapping can swap, and one of another."""
    return nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 4)})


class TestSavesThatFollow:
    """The next save may be a difference only to what was loaded under its own name."""

    @pytest.mark.parametrize("profile", ["lossless", "balanced"])
    @pytest.mark.parametrize("case", ["new layer", "fewer layers", "swapped", "all renamed"])
    def test_they_decode_to_what_was_live(self, profile: str, case: str, tmp_path: Path) -> None:
        makes: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
            "new layer": (small_model, with_a_head),
            "fewer layers": (with_a_head, small_model),
            "swapped": (twins, twins),
            "all renamed": (twins, lambda: nn.ModuleDict({"net": twins()})),
        }
        mapping: dict[str, Callable[[str], str]] = {
            "swapped": lambda name: {"a": "b", "b": "a"}.get(name[0], name[0]) + name[1:],
            "all renamed": lambda name: name.removeprefix("net."),
        }
        old, new = Run(makes[case][0]), Run(makes[case][1], seed=6)
        config = lossless(profile=profile)
        with Checkpointer(tmp_path, config) as checkpointer:
            for step in (1, 2):
                old.train(1, seed=step)
                checkpointer.save(step, old.model, old.optimizer)
        with Checkpointer(tmp_path, config) as checkpointer:
            checkpointer.load(new.model, new.optimizer, strict=False, mapping=mapping.get(case))
            new.train(1, seed=3)
            checkpointer.save(3, new.model, new.optimizer)
            first = new.state()
            new.train(1, seed=4)
            kind = checkpointer.save(4, new.model, new.optimizer).result.kind
        assert kind == "link"
        assert not verify_folder(tmp_path).findings
        for step, live in ((3, first), (4, new.state())):
            found = {n: t for n, t in read_whole(tmp_path, step).items() if n in live}
            if profile == "lossless":
                same_bits(found, {name: live[name] for name in found})
            for name, tensor in found.items():
                if name.startswith("model.") and tensor.is_floating_point():
                    assert torch.allclose(tensor, live[name], atol=0.01), name
            assert found.keys() == live.keys()
        fresh = Run(makes[case][1], seed=7)
        with Checkpointer(tmp_path, config) as checkpointer:
            checkpointer.load(fresh.model, fresh.optimizer)
        same_bits(fresh.state(), {n: read_whole(tmp_path, 4)[n] for n in fresh.state()})

    def test_ranks_that_hold_replicas_agree(self, tmp_path: Path) -> None:
        saved(tmp_path)
        config = lossless(profile="balanced")

        def body(group: Group) -> State:
            run = Run(with_a_head, seed=6)
            with Checkpointer(tmp_path, config, group=group) as checkpointer:
                checkpointer.load(run.model, run.optimizer, strict=False)
                run.train(1, seed=3)
                checkpointer.save(2, run.model, run.optimizer)
                run.train(1, seed=4)
                checkpointer.save(3, run.model, run.optimizer)
            return run.state()

        live = run_ranks(2, body)[0]
        kinds = {
            n: t.coding.kind for n, t in read_manifest(tmp_path / step_name(2))[0].tensors.items()
        }
        assert kinds["model.0.weight"] == "joint_weight"
        assert kinds["model.3.weight"] == "planes"
        found = read_whole(tmp_path, 3)
        assert torch.allclose(found["model.3.weight"], live["model.3.weight"], atol=0.01)
        assert not verify_folder(tmp_path).findings

    def test_a_run_that_never_writes_links_keeps_no_references(self, tmp_path: Path) -> None:
        run, other = saved(tmp_path), Run(seed=3)
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.load(other.model, other.optimizer)
            other.train(1, seed=2)
            assert checkpointer.save(2, other.model, other.optimizer).result.kind == "base"
        run.train(1, seed=2)
        same_bits(other.state(), run.state())
