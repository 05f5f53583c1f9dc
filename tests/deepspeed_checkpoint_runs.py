"""Helpers of the test_engines_deepspeed_checkpoint files: engines that save and load, FSDP2 beside them.

Nothing here imports DeepSpeed before a function is called: only ranks do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.deepspeed_runs import BASE, Model, merged, tokens_of, two_groups, whole_tensors

State = dict[str, torch.Tensor]
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 0.03, "weight_decay": 0.1}}}
LOSSLESS = {"effx": {"excp": {"profile": "lossless", "keep_latest_k": 0}}}
CAUTIOUS = merged(LOSSLESS, {"effx": {"cautious": {"implementation": "eager"}}})
TORCHS = merged(LOSSLESS, {"optimizer": {"params": {"torch_adam": True}}})
"""The blocks of configurations with our AdamW and torch's; with LOSSLESS alone, DeepSpeed's own."""
SMALL = {"zero_optimization": {"sub_group_size": 40, "stage3_param_persistence_threshold": 20}}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2}}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}


def make_engine(
    stage: int,
    *configs: Mapping[str, Any],
    block: Mapping[str, Any] = CAUTIOUS,
    model: nn.Module | None = None,
    **options: Any,
) -> Any:
    from effx_dist.engines import deepspeed

    unclipped = {"gradient_clipping": 0.0, "zero_optimization": {"stage": stage}}
    config = merged(BASE, ADAMW, unclipped, block, *configs)
    model = Model() if model is None else model
    groups = two_groups(model)
    return deepspeed.initialize(model=model, model_parameters=groups, config=config, **options)[0]


def train(engine: Any, num_steps: int = 1) -> list[float]:
    """Take steps with the batches of their numbers; returns this rank's losses."""
    losses = []
    for _ in range(num_steps):
        loss = engine(tokens_of(engine.global_steps))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def state_of(engine: Any) -> State:
    """Whole master weights, moments and steps, by the names that a checkpoint gives them."""
    found = {f"model.{n}": t for n, t in whole_tensors(engine, lambda p: p.flat).items()}
    states = engine.basic_optimizer.state
    for key in ("exp_avg", "exp_avg_sq"):
        moments = whole_tensors(engine, lambda p, key=key: states[p.flat][key])
        found |= {f"optimizer.{name}.{key}": tensor for name, tensor in moments.items()}
    from effx_dist.engines.deepspeed.partitions import partitions

    for partition in partitions(engine):
        step = torch.as_tensor(float(states[partition.flat]["step"]))
        found |= {f"optimizer.{whole.name}.step": step for whole in partition.wholes}
    return found


def frozen_of(engine: Any) -> State:
    """The frozen parameters, whole."""
    import deepspeed

    frozen = dict(engine.module.frozen.named_parameters())
    with deepspeed.zero.GatheredParameters(list(frozen.values())):
        return {name: param.detach().clone() for name, param in frozen.items()}


def computing(engine: Any) -> State:
    """The parameters that compute, whole."""
    import deepspeed

    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {f"model.{name}": param.detach().clone() for name, param in named.items()}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not differing, differing


def assert_cast(engine: Any, state: State) -> None:
    """The parameters that compute are the masters, rounded."""
    computed = computing(engine)
    trained = {name: t for name, t in state.items() if name.startswith("model.")}
    assert_same(
        {name: computed[name] for name in trained},
        {name: t.to(computed[name].dtype) for name, t in trained.items()},
    )


def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and an optimizer of the same groups under FSDP2, other values in them."""
    from torch.distributed.fsdp import fully_shard

    model = Model()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1)
    fully_shard(model)
    return model, torch.optim.AdamW(two_groups(model), lr=0.03, weight_decay=0.1)


def state_of_fsdp(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    found: State = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            found[f"model.{name}"] = param.full_tensor()  # type: ignore[operator]
            for key, value in optimizer.state.get(param, {}).items():
                whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                found[f"optimizer.{name}.{key}"] = whole
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def train_fsdp(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    model(tokens_of(step)).backward()
    optimizer.step()
    optimizer.zero_grad()
