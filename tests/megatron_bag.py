"""A Megatron model that is nothing but parameters, for the suite that judges the cautious step. Only for
processes that have the shim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from tests.conformance.cautious import Scenario, Session
from tests.megatron_runs import Case, transformer_config

# isort: split
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

import effx_dist as effx


class Bag(MegatronModule):
    """Parameters, those with even rows or columns cut over the tensor-parallel ranks."""

    def __init__(self, config: Any, wholes: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config)
        size = parallel_state.get_tensor_model_parallel_world_size()
        self.axes = {name: _axis(whole, size) for name, whole in wholes.items()}
        for name, whole in wholes.items():
            param = torch.nn.Parameter(self.part(name, whole).clone())
            param.tensor_model_parallel = self.axes[name] is not None  # type: ignore[attr-defined]
            self.register_parameter(name, param)

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What of a whole parameter, or of its gradient, this rank has before the optimizer cuts it."""
        axis = self.axes[name]
        if axis is None:
            return whole
        size = parallel_state.get_tensor_model_parallel_world_size()
        return whole.chunk(size, axis)[parallel_state.get_tensor_model_parallel_rank()].contiguous()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        axes = {name: axis for name, axis in self.axes.items() if axis is not None}
        return make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, axes)


def _axis(whole: torch.Tensor, size: int) -> int | None:
    even = [axis for axis, length in enumerate(whole.shape) if length % size == 0]
    return even[0] if even and size > 1 else None


class BagSession(Session):
    """Under the DistributedOptimizer, with several buckets."""

    def __init__(self, scenario: Scenario, wholes: dict[str, torch.Tensor]) -> None:
        config = transformer_config(Case(tp=parallel_state.get_tensor_model_parallel_world_size()))
        self._bag = Bag(config, wholes)
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, bucket_size=200)
        self._chunk = DistributedDataParallel(config, ddp_config, self._bag)
        self._megatron = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=1.0, clip_grad=0.0, use_distributed_optimizer=True
            ),
            [self._chunk],
            config_overrides={},
        )
        self._handle = effx.megatron.attach(
            self._megatron, [self._chunk], effx.EffxConfig.from_dict({"cautious": {}})
        )
        (inner,) = (found.optimizer for found in self._handle.layout.optimizers)
        own = scenario.build([list(wholes.items())])
        settings = {key: value for key, value in own.param_groups[0].items() if "param" not in key}
        for group in inner.param_groups:
            group.update(settings)
        self.optimizer = inner

    def set_grad(self, name: str, whole_grad: torch.Tensor | None) -> None:
        assert whole_grad is not None, "Megatron gives every parameter one"
        param: Any = self._bag.get_parameter(name)
        param.main_grad.copy_(self._bag.part(name, whole_grad))

    def step(self) -> None:
        done, *_ = self._megatron.step()
        assert done

    def whole_values(self, name: str) -> dict[str, torch.Tensor]:
        (params,) = self._handle.layout.params
        (param,) = (found for found in params if found.whole.name == name)
        held: dict[str, Any] = {}
        if param.main is not None:
            values = {"param": param.main.detach(), **self.optimizer.state.get(param.main, {})}
            held = {
                key: [(piece.box, piece.view(value)) for piece in param.pieces]
                if value.dim()
                else value
                for key, value in values.items()
            }
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, held)
        found: dict[str, torch.Tensor] = {}
        for values in told:
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    found[key] = value
                    continue
                whole = found.setdefault(key, torch.full(param.whole.shape, torch.nan))
                for box, part in value:
                    whole[box.slices] = part
        return found
