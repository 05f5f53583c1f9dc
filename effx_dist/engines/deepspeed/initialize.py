"""deepspeed.initialize, with what an "effx" block in the configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.ops.op_builder.all_ops import ALL_OPS
from torch.optim.optimizer import Optimizer
from torch.utils.data import Dataset

from effx_dist.engines.build_locks import await_builds
from effx_dist.engines.deepspeed import cautious
from effx_dist.engines.deepspeed.block import CONFIG_ARGUMENTS, Block, check_engine, read_block
from effx_dist.engines.deepspeed.handle import Handle


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
    model_parameters: Any = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = deepspeed.TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: str | dict[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | dict[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Arguments and returns of ``deepspeed.initialize``: engine, optimizer, loader, scheduler.

    The configuration may have an "effx" block. It is checked before anything is built, and neither the
    file nor the dict is changed. Without one, or with nothing on in it, this is deepspeed.initialize.
    With one, ``engine.effx`` is a :class:`Handle`, and:

    - "cautious": the optimizer of the configuration (AdamW, Adam, Lion) or of the call, object or
      callable, is replaced by its cautious form, with the same groups and settings.
    - "infobatch": the loader over ``training_data`` is an InfoBatchLoader, whose batches carry the samples'
      ids for ``engine.effx.weigh``.

    A lock that a killed build of DeepSpeed's operators has left is removed first; one of a build under way
    is waited for. Collective, as deepspeed.initialize is.

    Raises:
        BuildLockError: such a build does not end.
        ConfigError: the block is refused, or something in the rest of the configuration, the model or the
            optimizer cannot work beside it; on every rank, before anything is built.
    """
    given = dict(locals())  # the arguments, as deepspeed.initialize takes them
    block = read_block(args, config, config_params)
    await_builds(_is_deepspeeds)
    if block is None or model is None:  # DeepSpeed will ask for the model
        engine, *others = deepspeed.initialize(**given)
        return engine, *others
    check_engine(block, model, mpu)
    return _with_block(block, given)


def _with_block(block: Block, given: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    training_data = given["training_data"]
    changed = {
        "optimizer": cautious.prepare(given["optimizer"], block),
        "training_data": None if block.on.infobatch else training_data,
        "config": block.config_for_deepspeed(),
        "config_params": None,
    }
    with _without_config(given["args"]):
        engine, _, loader, scheduler = deepspeed.initialize(**given | changed)
    cautious.attach(engine)
    engine.effx = Handle(engine, block.effx)
    if block.on.infobatch and training_data is not None:
        loader = engine.training_dataloader = engine.effx.deepspeed_io(training_data)
    return engine, engine.optimizer, loader, scheduler


def init_distributed(*args: Any, **kwargs: Any) -> None:
    """``deepspeed.init_distributed``, once no lock of a killed build stands in its way: on the CPU it
    compiles an operator. Collective. Raises BuildLockError."""
    await_builds(_is_deepspeeds)
    deepspeed.init_distributed(*args, **kwargs)


def _is_deepspeeds(operator: str) -> bool:
    return operator in ALL_OPS


@contextmanager
def _without_config(args: Any) -> Iterator[None]:
    """``args`` name no configuration meanwhile: DeepSpeed takes it from one place alone. It may note the
    local rank in them.
    """
    named = {name: getattr(args, name) for name in CONFIG_ARGUMENTS if hasattr(args, name)}
    try:
        for name in named:
            setattr(args, name, None)
        yield
    finally:
        for name, value in named.items():
            setattr(args, name, value)
