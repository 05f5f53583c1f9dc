"""The "effx" block of a DeepSpeed configuration: where it is found, what is refused, what takes its place."""

from __future__ import annotations

import base64
import copy
import inspect
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from effx_dist.errors import ConfigError
from effx_dist.optim import CautiousAdamW, CautiousLion, CautiousSGD, CautiousWrapper
from tests.deepspeed_runs import BASE, BLOCK, merged, needs_deepspeed

pytestmark = [
    pytest.mark.deepspeed,
    needs_deepspeed,
    # DeepSpeed does not close the configuration's file.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]

ADAMW: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
EXCP: dict[str, Any] = {"effx": {"excp": {}}}


def read(config: Any = None, args: Any = None, config_params: Any = None) -> Any:
    from effx_dist.engines.deepspeed.block import read_block

    return read_block(args, config, config_params)


def prepared(config: dict[str, Any], optimizer: Any = None) -> Any:
    """What is given to DeepSpeed as the optimizer; made, where it is a callable."""
    from effx_dist.engines.deepspeed.cautious import prepare

    found = prepare(optimizer, read(merged(config)))
    is_made = found is None or isinstance(found, torch.optim.Optimizer)
    return found if is_made else found([nn.Parameter(torch.ones(3))])


class TestWhereItIsFound:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(merged(BASE, BLOCK)))
        return path

    def test_in_a_dict(self) -> None:
        config = merged(BASE, BLOCK)
        before = copy.deepcopy(config)
        block = read(config)
        assert block.on.cautious is not None
        assert block.on.infobatch is None
        assert block.on.excp is None
        assert block.config_for_deepspeed()["zero_allow_untested_optimizer"] is True
        assert config == before

    def test_in_a_file(self, path: Path) -> None:
        text = path.read_text()
        for block in (
            read(str(path)),
            read(config_params=str(path)),
            read(args=Namespace(deepspeed_config=str(path))),
            read(args=Namespace(deepspeed_config=None, deepscale_config=str(path))),
        ):
            assert block.on.cautious is not None
            assert block.config_for_deepspeed()["effx"] == BLOCK["effx"]
        assert path.read_text() == text

    def test_in_base64(self) -> None:
        text = base64.urlsafe_b64encode(json.dumps(BLOCK).encode()).decode()
        assert read(text).on.cautious is not None

    @pytest.mark.parametrize(
        "block", [{}, {"effx": None}, {"effx": {}}, {"effx": {"cautious": {"enabled": False}}}]
    )
    def test_nowhere(self, block: dict[str, Any]) -> None:
        assert read(merged(BASE, block)) is None

    def test_without_a_configuration_or_with_two_deepspeed_has_its_say(self, path: Path) -> None:
        assert read() is None
        assert read(args=Namespace(local_rank=0)) is None
        assert read(merged(BASE, BLOCK), args=Namespace(deepspeed_config=str(path))) is None

    def test_an_unknown_key_names_the_nearest_and_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "ds.json"
        path.write_text('{"effx": {"excp": {"base_evry": 5}}}')
        with pytest.raises(ConfigError, match=r"ds\.json: effx\.excp\.base_evry.*base_every"):
            read(str(path))
        with pytest.raises(ConfigError, match=r"effx\.cautios.*cautious"):
            read({"effx": {"cautios": {}}})

    def test_initialize_has_the_arguments_of_deepspeed(self) -> None:
        import deepspeed

        from effx_dist import deepspeed as ours

        def arguments(function: Callable[..., Any]) -> dict[str, Any]:
            found = inspect.signature(function).parameters.values()
            return {argument.name: argument.default for argument in found}

        assert arguments(ours.initialize) == arguments(deepspeed.initialize)
        assert ours.add_config_arguments is deepspeed.add_config_arguments
        assert ours.zero is deepspeed.zero
        assert not hasattr(ours, "no_such_name")


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


CUT_OTHERWISE = [
    zero(offload_optimizer={"device": "nvme"}),
    zero(offload_optimizer={"device": "cpu", "super_offload": True}),
    zero(zenflow={"topk_ratio": 0.1}),
    zero(zero_hpz_partition_size=2),
    zero(mics_shard_size=2),
    {"tensor_parallel": {"autotp_size": 2}},
    {"expert_parallel": {"enabled": True}},
]
NO_STEP = [
    zero(offload_optimizer={"device": "cpu", "ratio": 0.5}),
    {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
    {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
    {"torch_autocast": {"enabled": True, "dtype": "float16"}},
]
WORKS = [
    zero(stage=3, offload_optimizer={"device": "cpu", "ratio": 1.0}),
    zero(stage=2, zero_hpz_partition_size=1),
    {"bf16": {"enabled": True}},
    {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
]


class ParallelMpu:
    """As Megatron's, with two tensor-parallel ranks."""

    def get_model_parallel_world_size(self) -> int:
        return 2


def unbuilt(kind: type[nn.Module], **attributes: Any) -> nn.Module:
    """A module that could only be built on ranks."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    vars(module).update(attributes)
    return module


class TestWhatIsRefused:
    def check(
        self, config: dict[str, Any], model: nn.Module | None = None, mpu: Any = None
    ) -> None:
        from effx_dist.engines.deepspeed.block import check_engine

        check_engine(read(merged(BASE, config)), model or nn.Linear(2, 2), mpu)

    @pytest.mark.parametrize("setting", [*CUT_OTHERWISE, *NO_STEP], ids=str)
    def test_beside_cautious(self, setting: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=f"{next(iter(setting))}.*: .*(must|use|take it out)"):
            self.check(merged(BLOCK, setting))

    @pytest.mark.parametrize("setting", CUT_OTHERWISE, ids=str)
    def test_beside_checkpoints(self, setting: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(setting))):
            self.check(merged(EXCP, setting))

    @pytest.mark.parametrize("setting", WORKS, ids=str)
    def test_but_not_what_works(self, setting: dict[str, Any]) -> None:
        self.check(merged(BLOCK, EXCP, setting))

    @pytest.mark.parametrize("setting", [*CUT_OTHERWISE, *NO_STEP], ids=str)
    def test_nor_beside_pruning_alone(self, setting: dict[str, Any]) -> None:
        self.check(merged({"effx": {"infobatch": {"num_epochs": 2}}}, setting))

    def test_another_choice_of_samples(self) -> None:
        sampling = {"data_sampling": {"curriculum_learning": {"enabled": True}}}
        config = {"data_efficiency": sampling, "effx": {"infobatch": {"num_epochs": 2}}}
        with pytest.raises(ConfigError, match=r"curriculum_learning.*: chooses the samples"):
            self.check(config)
        self.check(merged(config, BLOCK, {"effx": {"infobatch": {"enabled": False}}}))

    def test_tensor_parallel_ranks(self) -> None:
        with pytest.raises(ConfigError, match=r"get_model_parallel_world_size\(\) = 2"):
            self.check(BLOCK, mpu=ParallelMpu())

    @pytest.mark.parametrize("block", [BLOCK, EXCP], ids=str)
    def test_layers_over_groups_of_their_own(self, block: dict[str, Any]) -> None:
        from deepspeed.moe.layer import MoE

        with pytest.raises(ConfigError, match="model: its MoE layers"):
            self.check(block, nn.Sequential(unbuilt(MoE, num_experts=2)))

    def test_pipelines(self) -> None:
        from deepspeed.pipe import PipelineModule

        with pytest.raises(ConfigError, match=r"model=PipelineModule: .*; use ZeRO"):
            self.check({"effx": {"infobatch": {"num_epochs": 2}}}, unbuilt(PipelineModule))

    def test_all_at_once(self) -> None:
        with pytest.raises(ConfigError, match=r"(?s)zenflow.*autotp_size.*ratio"):
            self.check(merged(BLOCK, CUT_OTHERWISE[2], CUT_OTHERWISE[5], NO_STEP[0]))


class TestOptimizerOfTheConfiguration:
    @pytest.mark.parametrize(
        "kind", ["OneBitAdam", "Muon", "Lamb", "Adagrad", "Adafactor", "MuAdam", "nonsense"]
    )
    def test_a_type_without_a_cautious_form(self, kind: str) -> None:
        with pytest.raises(ConfigError, match=f"'{kind}': has no cautious form; .*AdamW.*Lion"):
            prepared(merged(BLOCK, {"optimizer": {"type": kind}}))

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"lrate": 1}, "AdamW has no lrate; must be of lr, betas"),
            ({"max_grad_norm": 1.0}, "gradient_clipping"),
            ({"bias_correction": False}, "bias_correction = False: .* must be True"),
            ({"amsgrad": True}, "amsgrad = True: .* must be False"),
        ],
    )
    def test_a_setting_without_one(self, params: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            prepared(merged(BLOCK, ADAMW, {"optimizer": {"params": params}}))

    def test_none_at_all(self, caplog: pytest.LogCaptureFixture) -> None:
        """A reference engine has none, and nothing that could be cautious."""
        assert prepared(BLOCK) is None
        assert [record.message.count("has no optimizer") for record in caplog.records] == [1]

    @pytest.mark.parametrize(
        ("section", "kind", "settings"),
        [
            ({"type": "AdamW"}, CautiousAdamW, {"lr": 1e-3, "weight_decay": 0.0}),
            ({"type": "adam"}, CautiousAdamW, {"eps": 1e-8, "betas": (0.9, 0.999)}),
            (
                {"type": "AdamW", "params": {"torch_adam": True}},
                CautiousAdamW,
                {"weight_decay": 1e-2},
            ),
            (
                {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}},
                CautiousWrapper,
                {"weight_decay": 0.1},
            ),
            ({"type": "Adam", "params": {"adam_w_mode": False}}, CautiousAdamW, {}),
            (
                {"type": "AdamW", "params": {"torch_adam": True, "amsgrad": True}},
                CautiousWrapper,
                {"amsgrad": True},
            ),
            ({"type": "Lion"}, CautiousLion, {"lr": 1e-3, "betas": (0.9, 0.999)}),
            ({"type": "SGD", "params": {"momentum": 0.9}}, CautiousSGD, {"momentum": 0.9}),
        ],
        ids=str,
    )
    def test_keeps_deepspeeds_meaning(
        self, section: dict[str, Any], kind: type, settings: dict[str, Any]
    ) -> None:
        found = prepared(merged(BLOCK, {"optimizer": section}))
        assert type(found) is kind
        assert settings.items() <= found.param_groups[0].items()

    def test_has_the_settings_of_the_block(self) -> None:
        block = {"effx": {"cautious": {"cautious_weight_decay": True, "implementation": "eager"}}}
        for kind in ("AdamW", "Lion"):
            found = prepared(merged(block, {"optimizer": {"type": kind}}))
            assert found.param_groups[0]["cautious_weight_decay"] is True
            assert found.implementation == "eager"


class TestOptimizerOfTheUser:
    def make(self, name: str, **settings: Any) -> Any:
        return getattr(torch.optim, name)([nn.Parameter(torch.ones(3))], **settings)

    @pytest.mark.parametrize(
        ("name", "settings", "kind"),
        [
            ("AdamW", {}, CautiousAdamW),
            ("Adam", {}, CautiousAdamW),
            ("Adam", {"weight_decay": 0.1}, CautiousWrapper),
            ("AdamW", {"amsgrad": True}, CautiousWrapper),
            ("SGD", {"momentum": 0.9}, CautiousSGD),
            ("SGD", {"momentum": 0.9, "weight_decay": 0.1}, CautiousWrapper),
            ("RMSprop", {}, CautiousWrapper),
        ],
    )
    def test_becomes_its_cautious_form(
        self, name: str, settings: dict[str, Any], kind: type
    ) -> None:
        given = self.make(name, **settings)
        found = prepared(BLOCK, given)
        assert type(found) is kind
        for _ in range(2):
            assert found.param_groups is given.param_groups, "schedulers write to it"
            assert found.state is given.state
            found.load_state_dict(found.state_dict())

    def test_its_hooks_are_called(self) -> None:
        given = self.make("AdamW")
        calls: list[str] = []
        given.register_step_pre_hook(lambda *_: calls.append("before"))
        found = prepared(BLOCK, given)
        given.register_step_post_hook(lambda *_: calls.append("after"))
        found.step()
        assert calls == ["before", "after"]

    def test_is_left_alone_where_the_section_is_off(self) -> None:
        given = self.make("AdamW")
        assert prepared(EXCP, given) is given
        assert prepared(EXCP) is None

    @pytest.mark.parametrize("name", ["Adagrad", "LBFGS", "Adafactor"])
    def test_one_without_a_form(self, name: str) -> None:
        with pytest.raises(ConfigError, match=rf"optimizer={name}: .*effx_dist\.cautious\("):
            prepared(BLOCK, self.make(name))

    def test_cautious_decay_of_one_that_is_masked_from_outside(self) -> None:
        block = {"effx": {"cautious": {"cautious_weight_decay": True}}}
        with pytest.raises(
            ConfigError,
            match=r"effx.cautious: cautious_weight_decay=True: Adam adds weight_decay=0.1",
        ):
            prepared(block, self.make("Adam", weight_decay=0.1))
