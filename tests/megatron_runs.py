"""Small Megatron models on the CPU, in processes of their own: import nothing of this elsewhere."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests import megatron_shim  # noqa: F401  before megatron

# isort: split
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from effx_dist.engines.megatron.job_layout import JobLayout
from effx_dist.engines.megatron.local_tensors import MainParam, find_local_tensors
from effx_dist.shard import Piece, WholeTensor

VOCABULARY = 96
SEQUENCE = 16
SEED = 123


@dataclass(frozen=True)
class Case:
    """One model, its layout and its optimizer."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    virtual: int | None = None
    """Chunks of a pipeline stage."""
    instances: int = 1
    """Of the distributed optimizer: the data-parallel ranks are so many groups, each with all of it."""
    dtype: torch.dtype = torch.float32
    distributed: bool = True
    optimizer: str = "adam"
    tied: bool = False
    vocabulary: int = VOCABULARY
    num_experts: int | None = None
    weight_decay: float = 0.1
    frozen: tuple[str, ...] = ()
    ddp: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        dp = dist.get_world_size() // (self.tp * self.pp)
        return f"tp{self.tp}-pp{self.pp}-dp{dp}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def is_wide(self) -> bool:
        return self.dtype == torch.float32


@contextmanager
def parallel(case: Case) -> Iterator[None]:
    """Megatron's groups over all ranks there are; none is left over, as each has threads of its own."""
    known = set(distributed_c10d._world.pg_map)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        expert_model_parallel_size=case.ep,
        virtual_pipeline_model_parallel_size=case.virtual,
        num_distributed_optimizer_instances=case.instances,
    )
    made = set(distributed_c10d._world.pg_map) - known
    model_parallel_cuda_manual_seed(SEED)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        for group in made & set(distributed_c10d._world.pg_map):
            dist.destroy_process_group(group)


def transformer_config(case: Case) -> TransformerConfig:
    moe: dict[str, Any] = {}
    if case.num_experts:
        moe = {
            "num_moe_experts": case.num_experts,
            "moe_router_topk": 2,
            "moe_token_dispatcher_type": "allgather",
            "moe_router_load_balancing_type": "none",
        }
    return TransformerConfig(
        **{
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "tensor_model_parallel_size": case.tp,
            "pipeline_model_parallel_size": case.pp,
            "expert_model_parallel_size": case.ep,
            "virtual_pipeline_model_parallel_size": case.virtual,
            "pipeline_dtype": case.dtype,
            "params_dtype": case.dtype,
            "bf16": case.dtype == torch.bfloat16,
            "fp16": case.dtype == torch.float16,
            "use_cpu_initialization": True,
            "perform_initialization": True,
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "persist_layer_norm": False,
            "bias_dropout_fusion": False,
            "bias_activation_fusion": False,
            "apply_rope_fusion": False,
            "masked_softmax_fusion": False,
            "gradient_accumulation_fusion": False,
        }
        | moe
        | case.config
    )


def gpt_model(case: Case, chunk: int | None = None) -> GPTModel:
    """Llama's shape; the chunk of this pipeline stage with that number, if it has several."""
    torch.manual_seed(SEED)
    return GPTModel(
        config=transformer_config(case),
        transformer_layer_spec=_layers(case),
        vocab_size=case.vocabulary,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(chunk is None, chunk),
        post_process=parallel_state.is_pipeline_last_stage(chunk is None, chunk),
        vp_stage=chunk,
        share_embeddings_and_output_weights=case.tied,
        position_embedding_type="rope",
    )


@dataclass
class Job:
    """What a Megatron script holds."""

    case: Case
    chunks: list[DistributedDataParallel]
    optimizer: Any

    def step(
        self, tokens: torch.Tensor, before_update: Callable[[], None] = lambda: None
    ) -> tuple[bool, Any, Any]:
        """One optimizer step on this data-parallel rank's ``tokens`` ``[micro, batch, seq + 1]``."""
        num_micro, size, _ = tokens.shape
        init_num_microbatches_calculator(0, None, num_micro * size * self.dp, size, self.dp)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(tokens),
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=num_micro,
            seq_length=SEQUENCE,
            micro_batch_size=size,
            forward_only=False,
        )
        destroy_num_microbatches_calculator()
        before_update()
        done: tuple[bool, Any, Any] = self.optimizer.step()
        return done

    @property
    def dp(self) -> int:
        return parallel_state.get_data_parallel_world_size()

    def train(self, num_steps: int, first: int = 0) -> None:
        """Steps on batches that are the same at every layout."""
        for step in range(first, first + num_steps):
            self.step(self.batch(step))

    def batch(self, step: int, size: int = 4) -> torch.Tensor:
        """This rank's part of the step's global batch, as one micro-batch."""
        torch_seed = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(0, VOCABULARY, (size, SEQUENCE + 1), generator=torch_seed)
        rank = parallel_state.get_data_parallel_rank()
        return tokens.chunk(self.dp)[rank].unsqueeze(0)


def _forward_step(
    data: Iterator[torch.Tensor], model: Any
) -> tuple[torch.Tensor, Callable[..., Any]]:
    tokens = next(data)
    positions = torch.arange(SEQUENCE).expand(tokens.shape[0], -1)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    output = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])

    def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach()}

    return output, loss_func


def _layers(case: Case) -> Any:
    if "moe_layer_freq" in case.config:
        config = transformer_config(case)
        return get_gpt_decoder_block_spec(config, False, normalization="RMSNorm")
    return get_gpt_layer_local_spec(
        num_experts=case.num_experts, moe_grouped_gemm=False, normalization="RMSNorm"
    )


def make_job(case: Case) -> Job:
    """Model, buckets and optimizer, as a Megatron script makes them; within :func:`parallel`. The weights
    are the same at every layout."""
    numbers = [None] if case.virtual is None else list(range(case.virtual))
    chunks = [_wrapped(case, gpt_model(case, number), number) for number in numbers]
    optimizer_config = OptimizerConfig(
        **{
            "optimizer": case.optimizer,
            "lr": 1e-2,
            "min_lr": 1e-4,
            "weight_decay": case.weight_decay,
            "bf16": case.dtype == torch.bfloat16,
            "fp16": case.dtype == torch.float16,
            "params_dtype": case.dtype,
            "clip_grad": 1.0,
            "use_distributed_optimizer": case.distributed,
        }
        | case.options
    )
    give_weights(chunks)
    optimizer = get_megatron_optimizer(optimizer_config, chunks)
    for chunk in chunks:
        chunk.config.grad_scale_func = optimizer.scale_loss if case.dtype == torch.float16 else None
    return Job(case, chunks, optimizer)


def _wrapped(case: Case, module: Any, number: int | None) -> DistributedDataParallel:
    config = transformer_config(case)
    for name in case.frozen:
        module.get_parameter(name).requires_grad_(False)
    if not case.is_wide:
        module = Float16Module(config, module)
    ddp_config = DistributedDataParallelConfig(
        **{
            "use_distributed_optimizer": case.distributed,
            "bucket_size": 4000,
            "num_distributed_optimizer_instances": case.instances,
        }
        | case.ddp
    )
    chunk = DistributedDataParallel(config, ddp_config, module, disable_bucketing=bool(number))
    chunk.config.finalize_model_grads_func = finalize_model_grads
    return chunk


def give_weights(chunks: Sequence[Any]) -> None:
    """To each parameter what its name says, of which every rank takes its parts."""
    for local in find_local_tensors(chunks):
        whole = whole_weight(local.name, local.shape).to(local.tensor)
        for box, start in local.boxes:
            piece = Piece(WholeTensor(local.name, local.shape), box, start)
            piece.view(local.tensor.data).copy_(whole[box.slices])


def whole_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """float32. A tensor with more rows begins with those of one with fewer."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    scaled = torch.from_numpy(values).float() * 0.05
    return scaled + 1 if "norm" in name else scaled


@dataclass
class Gathered:
    """One tensor, put together from all ranks."""

    values: torch.Tensor
    held: torch.Tensor
    """How often each element is held, duplicates for other reasons than data parallelism apart."""

    @property
    def times(self) -> set[int]:
        return set(self.held.unique().tolist())


def gathered(
    layout: JobLayout, of: Callable[[Any, MainParam], torch.Tensor | None]
) -> dict[str, Gathered]:
    """By name, what ``of`` an optimizer and a parameter gives, in the order of what is stepped. Duplicates
    must be equal. Collective; the result is the first rank's, others get nothing."""
    held = [
        (param.whole.name, param.whole.shape, param.local.is_main, piece.box, piece.view(local))
        for optimizer, params in zip(layout.optimizers, layout.params, strict=True)
        for param in params
        if param.main is not None and (local := of(optimizer, param)) is not None
        for piece in param.pieces
    ]
    told: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object([(*rest, part.detach().clone()) for *rest, part in held], told)
    found: dict[str, Gathered] = {}
    for name, shape, is_main, box, part in [piece for row in told or [] for piece in row]:
        if name not in found:
            found[name] = Gathered(
                torch.full(shape, torch.nan, dtype=part.dtype), torch.zeros(shape)
            )
        there = found[name].values[box.slices]
        known = ~there.isnan()
        assert torch.equal(there[known], part[known]), f"{name}: duplicates differ"
        found[name].values[box.slices] = part
        found[name].held[box.slices] += int(is_main)
    return found


def mains(layout: JobLayout) -> dict[str, Gathered]:
    """The master weights."""
    return gathered(layout, lambda _, param: param.main)


def states(layout: JobLayout, key: str) -> dict[str, Gathered]:
    """What the inner optimizers keep for each element; numbers of steps as tensors full of them."""

    def of(optimizer: Any, param: MainParam) -> torch.Tensor | None:
        value = optimizer.optimizer.state[param.main].get(key)
        if value is None and key == "step":
            value = optimizer.optimizer.param_groups[param.group_index].get(key)
        if value is None or param.main is None:
            return None
        is_number = not isinstance(value, torch.Tensor) or value.shape != param.main.shape
        return torch.full_like(param.main, float(value)) if is_number else value

    return gathered(layout, of)
