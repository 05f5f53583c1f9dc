"""What the adapter needs of Megatron-core, and what it cannot work under; told before anything is changed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import megatron.core
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from effx_dist.errors import ConfigError, MissingEngineError

TESTED_VERSIONS = ("0.16.1", "0.19.2")
"""The first and the last; the strategies with the first alone."""
_BASE = "megatron.core.dist_checkpointing.strategies.base"


def has_strategies() -> bool:
    """Whether this Megatron-core lets a library add strategies to dist_checkpointing."""
    return importlib.util.find_spec(_BASE) is not None


def strategies() -> ModuleType:
    """The module of the strategies. Raises MissingEngineError where this Megatron-core has no place for
    them."""
    if not has_strategies():
        raise MissingEngineError(
            f"megatron-core {megatron.core.__version__}: its dist_checkpointing takes no strategies of others (it "
            f"did in {TESTED_VERSIONS[0]}); use handle.save_checkpoint and handle.load_checkpoint, which write and "
            "read the same checkpoints"
        )
    return importlib.import_module("effx_dist.engines.megatron.strategies")


_KINDS = (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer)
_NEEDED = {
    DistributedOptimizer: (
        *("buffers", "data_parallel_group", "model_chunks", "tp_group"),
        *("model_float16_groups", "shard_fp32_from_float16_groups"),
        *("model_fp32_groups", "shard_fp32_groups"),
        *("_get_model_param_range_map", "_copy_main_params_to_model_params"),
    ),
    Float16OptimizerWithFloat16Params: (
        *("float16_groups", "fp32_from_float16_groups", "fp32_from_fp32_groups", "tp_group"),
        "_copy_main_params_to_model_params",
    ),
    FP32Optimizer: ("tp_group",),
}
"""What Megatron does not document, by the kind of optimizer that must have it."""

_OPTIMIZER_SETTINGS = {
    "use_precision_aware_optimizer": "keeps the master weights inside Transformer Engine's FusedAdam, in parts "
    "that no other optimizer can step or read exactly",
    "optimizer_cpu_offload": "steps part of the parameters by a second optimizer on the host, out of reach here",
}
_DDP_SETTINGS = {
    "use_megatron_fsdp": "cuts parameters in a way of its own; use the distributed optimizer",
    "fp8_param_gather": "keeps the parameters in 8 bits, which master weights cannot be written to from here",
}


def check(whole: Any, optimizers: Sequence[Any], model_chunks: Sequence[Any]) -> None:
    """Refuse what the adapter cannot work with. No communication is performed.

    Args:
        whole: what get_megatron_optimizer has made, or None.
        optimizers: those behind it that hold parameters here.
        model_chunks: of the job.

    Raises ConfigError: every problem is listed, with what to do.
    """
    found = [*_of_whole(whole)] or [*_of_optimizers(optimizers), *_of_chunks(model_chunks)]
    if found:
        heading = "effx_dist.megatron.attach: cannot work with this:"
        raise ConfigError("\n  ".join([heading, *dict.fromkeys(found)]))


def _of_whole(whole: Any) -> Iterator[str]:
    if type(whole).__name__ == "LayerWiseDistributedOptimizer":
        yield (
            "optimizer: LayerWiseDistributedOptimizer gives each data-parallel rank parameters of its own, of "
            "which the others hold nothing; use the distributed optimizer (use_layer_wise_distributed_optimizer "
            "off)"
        )


def _of_optimizers(optimizers: Sequence[Any]) -> Iterator[str]:
    for optimizer in optimizers:
        kind = next((kind for kind in _KINDS if isinstance(optimizer, kind)), None)
        if kind is None or type(optimizer) not in _KINDS:
            names = ", ".join(known.__name__ for known in _KINDS)
            yield f"optimizer: {type(optimizer).__name__} is none of {names}; use OptimizerConfig(optimizer='adam')"
            continue
        inner = type(getattr(optimizer, "optimizer", None))
        if "muon" in inner.__name__.lower():
            yield (
                f"optimizer: {inner.__name__} orthogonalises whole matrices, which no rank of a tensor-parallel or "
                "partitioned job holds, so that its steps can neither be masked nor its state be cut elsewhere; "
                "use OptimizerConfig(optimizer='adam')"
            )
            continue
        for name, reason in _OPTIMIZER_SETTINGS.items():
            if getattr(optimizer.config, name, False):
                yield f"OptimizerConfig.{name}=True: {reason}; must be False"
        missing = [name for name in _NEEDED[kind] if not hasattr(optimizer, name)]
        if missing and not _settings_explain(optimizer):
            yield (
                f"optimizer: this {kind.__name__} of megatron-core {megatron.core.__version__} has no "
                f"{', '.join(missing)}, which the adapter needs and finds on those that get_megatron_optimizer makes "
                f"(tested with {' and '.join(TESTED_VERSIONS)})"
            )


def _settings_explain(optimizer: Any) -> bool:
    """Whether a setting that is refused anyway explains what is missing: Megatron FSDP leaves a DistributedOptimizer
    without buffers."""
    return bool(getattr(getattr(optimizer, "ddp_config", None), "use_megatron_fsdp", False))


def _of_chunks(model_chunks: Sequence[Any]) -> Iterator[str]:
    for chunk in model_chunks:
        config = getattr(chunk, "ddp_config", None)
        for name, reason in _DDP_SETTINGS.items():
            if getattr(config, name, False):
                yield f"DistributedDataParallelConfig.{name}=True: {reason}; must be False"
