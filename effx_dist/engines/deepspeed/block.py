"""The "effx" block of a DeepSpeed configuration, and what of the rest of it cannot work beside it.

All of it is looked at before DeepSpeed builds anything, on every rank alike. No communication is
performed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.moe.utils import has_moe_layers
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from torch import nn

from effx_dist.config import BLOCK, EffxConfig
from effx_dist.errors import ConfigError

CONFIG_ARGUMENTS = ("deepscale_config", "deepspeed_config")
"""Attributes of ``args`` that may name the configuration; the first is the older name."""


@dataclass(frozen=True)
class Block:
    """What the configuration that deepspeed.initialize was given asks of effx_dist.

    Attributes:
        effx: the block, checked.
        config: the whole configuration, as it was given; not to be changed.
    """

    effx: EffxConfig
    config: Mapping[str, Any]

    @property
    def on(self) -> EffxConfig:
        """The block's sections that are on."""
        return self.effx.on

    def config_for_deepspeed(self) -> dict[str, Any]:
        """A copy in which DeepSpeed is told to take an optimizer that is not its own."""
        if self.on.cautious is None:
            return dict(self.config)
        allowed = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        return {**self.config, **allowed}


def read_block(args: Any, config: Any, config_params: Any) -> Block | None:
    """The block, from where deepspeed.initialize takes its configuration: ``config``, else
    ``config_params``, else ``args.deepspeed_config``; a dict, the path of a JSON file, or JSON in base64.

    None where there is no configuration, no block in it, or nothing in that is on, and where there are
    two configurations, of which DeepSpeed will complain.

    Raises:
        ConfigError: something in the block is refused; every problem is listed, and the file named.
    """
    of_args = [getattr(args, name, None) for name in CONFIG_ARGUMENTS]
    given = [source for source in of_args if source is not None]
    of_call = config if config is not None else config_params
    if of_call is not None:
        given.append(of_call)
    if len(given) != 1:
        return None
    values = load_ds_config(given[0])
    if values.get(BLOCK) is None:
        return None
    try:
        effx = EffxConfig.from_dict({BLOCK: values[BLOCK]})
    except ConfigError as error:
        if isinstance(given[0], str) and Path(given[0]).is_file():
            raise ConfigError(f"{given[0]}: {error}") from None
        raise
    block = Block(effx, values)
    return block if block.on != EffxConfig() else None


@dataclass(frozen=True)
class _Refusal:
    """A setting of DeepSpeed, by its dotted path, that a section cannot work beside."""

    path: str
    is_refused: Callable[[Any], bool]
    remedy: str

    def problem(self, config: Mapping[str, Any]) -> str | None:
        value: Any = config
        for key in self.path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        try:
            is_refused = value is not None and self.is_refused(value)
        except (TypeError, AttributeError):  # of a wrong type, of which DeepSpeed will complain
            is_refused = False
        return f"{self.path} = {value!r}: {self.remedy}" if is_refused else None


_OFFLOAD = "zero_optimization.offload_optimizer"

_WITHOUT_PARTITIONS = (
    _Refusal(
        f"{_OFFLOAD}.device",
        lambda device: device == "nvme",
        'keeps masters and moments out of memory, where no step or checkpoint finds them; use "cpu"',
    ),
    _Refusal(f"{_OFFLOAD}.super_offload", bool, "steps by an optimizer of its own; must be false"),
    _Refusal(
        "zero_optimization.zenflow",
        lambda _: True,
        "steps parts of a parameter at different times; take it out",
    ),
    _Refusal(
        "zero_optimization.zero_hpz_partition_size",
        lambda size: size > 1,
        "keeps second partitions, which have not been tried; must be 1",
    ),
    _Refusal(
        "zero_optimization.mics_shard_size",
        lambda size: size > 0,
        "partitions within subsets of the ranks, which has not been tried; must be -1",
    ),
    _Refusal(
        "tensor_parallel.autotp_size",
        lambda size: size > 1,
        "cuts parameters before ZeRO does, and does not tell the whole; must be 0 or 1",
    ),
    _Refusal(
        "expert_parallel.enabled", bool, "spreads experts over groups of their own; must be false"
    ),
)
"""What leaves no partitions of named parameters to find: for cautious and excp."""

_OTHER_SAMPLES = _Refusal(
    "data_efficiency.data_sampling.curriculum_learning.enabled",
    bool,
    "chooses the samples, as effx.infobatch does; switch one of them off",
)

_NEEDS_CPU_ADAM = "needs DeepSpeedCPUAdam; must be false (effx.cautious steps float32 masters)"
_NO_CAUTIOUS_STEP = (
    _Refusal(
        f"{_OFFLOAD}.ratio",
        lambda ratio: ratio < 1,
        "steps the rest by torch's AdamW, which is not cautious; must be 1.0",
    ),
    *(
        _Refusal(f"{section}.{dtype}_master_weights_and_grads", bool, _NEEDS_CPU_ADAM)
        for section, dtype in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16"))
    ),
    _Refusal(
        "torch_autocast",
        lambda section: bool(section.get("enabled")) and "bf" not in str(section.get("dtype")),
        "scales losses by a GradScaler of its own for each group; use bfloat16, or the fp16 section",
    ),
)
"""What else no cautious optimizer can step under."""


def check_engine(block: Block, model: nn.Module, mpu: Any) -> None:
    """Refuse a kind of engine that the sections that are on cannot work in.

    Raises:
        ConfigError: every problem is listed, with what to do.
    """
    problems: list[str | None] = []
    if isinstance(model, PipelineModule):
        problems.append(
            "model=PipelineModule: DeepSpeed's pipeline engine has no adapter; use ZeRO"
        )
    if block.on.cautious or block.on.excp:
        problems += [refusal.problem(block.config) for refusal in _WITHOUT_PARTITIONS]
        problems += _mixed_groups(model, mpu)
    if block.on.cautious:
        problems += [refusal.problem(block.config) for refusal in _NO_CAUTIOUS_STEP]
    if block.on.infobatch:
        problems.append(_OTHER_SAMPLES.problem(block.config))
    found = [problem for problem in problems if problem]
    if found:
        heading = f'the "{BLOCK}" block cannot work with this; change it, or take the block out:'
        raise ConfigError("\n  ".join([heading, *found]))


def _mixed_groups(model: nn.Module, mpu: Any) -> list[str]:
    found = []
    if has_moe_layers(model)[0]:
        found.append(
            "model: its MoE layers are spread over groups of their own, which has not been tried; "
            "use dense layers"
        )
    of_mpu = getattr(mpu, "get_model_parallel_world_size", None)
    if of_mpu is not None and of_mpu() > 1:
        found.append(
            f"mpu.get_model_parallel_world_size() = {of_mpu()}: parameters are cut before ZeRO does, and "
            "the whole is not told; must be 1"
        )
    return found
