"""What a Megatron-core run can be told beside the settings that all runs share."""

from typing import Literal, Self

from pydantic import Field, model_validator

from launch.llama.settings import RunSettings, Section


class MegatronSettings(Section):
    """Layout of the ranks and precision, named as Megatron's own arguments."""

    tensor_model_parallel_size: int = Field(default=1, gt=0)
    """Ranks that share every layer."""
    pipeline_model_parallel_size: int = Field(default=1, gt=0)
    """Ranks that share out the layers."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the forward and backward passes; master weights and optimizer state are always float32."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass goes on."""
    distributed_backend: Literal["nccl", "gloo"] = "nccl"
    """"gloo" where several ranks share one device."""


class MegatronRunSettings(RunSettings):
    """All of one run."""

    megatron: MegatronSettings = MegatronSettings()

    @model_validator(mode="after")
    def _layout_divides(self) -> Self:
        model, megatron = self.model, self.megatron
        stages, parts = megatron.pipeline_model_parallel_size, megatron.tensor_model_parallel_size
        if model.num_layers % stages:
            raise ValueError(
                f"model.num_layers={model.num_layers}: must be a multiple of "
                f"megatron.pipeline_model_parallel_size={stages}"
            )
        for name in ("num_heads", "num_kv_heads", "intermediate_size"):
            if getattr(model, name) % parts:
                raise ValueError(
                    f"model.{name}={getattr(model, name)}: must be a multiple of "
                    f"megatron.tensor_model_parallel_size={parts}"
                )
        return self
