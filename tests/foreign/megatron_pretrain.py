"""Megatron-LM's own pretrain(), from a checkout, with this library's hooks, on a CPU.

torchrun --nproc-per-node 2 tests/foreign/megatron_pretrain.py CHECKOUT OUT [Megatron's arguments...]

Writes OUT/rank-N.json: the iterations, losses, learning rates and samples of this rank. Started again with the
same OUT it goes on from the checkpoint there.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCHDYNAMO_DISABLE": "1"}
CHECKOUT, OUT = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(CHECKOUT))
from tests import megatron_shim  # noqa: E402, F401  before megatron

# isort: split
import torch  # noqa: E402

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: int(os.environ["WORLD_SIZE"])
torch.cuda.get_device_capability = lambda *_: (8, 0)
for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
    setattr(torch.cuda, name, lambda *_, **__: 0)
torch.cuda.get_device_properties = lambda *_: type(
    "P",
    (),
    {"total_memory": 2**34, "name": "cpu", "multi_processor_count": 1, "major": 8, "minor": 0},
)()
torch.cuda.memory_stats = lambda *_, **__: {}
torch.cuda.empty_cache = lambda: None
torch.Tensor.pin_memory = lambda self, *_: self
torch.cuda.mem_get_info = lambda *_: (2**34, 2**34)

# isort: split
import megatron.core.datasets.utils  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.parallel_state import is_pipeline_first_stage, is_pipeline_last_stage  # noqa: E402
from megatron.training import get_args, pretrain  # noqa: E402
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args  # noqa: E402

import effx_dist as effx  # noqa: E402

megatron.core.datasets.utils.compile_helpers = lambda: None  # for data sets of Megatron's own

NUM_SAMPLES, LENGTH, VOCABULARY, EPOCHS = 64, 16, 64, 3
BLOCK = {
    "infobatch": {"num_epochs": EPOCHS, "prune_ratio": 0.5, "delta": 0.7, "score": "loss"},
    "cautious": {"implementation": "eager"},
    "excp": {"profile": "lossless", "async_mode": "sync", "keep_latest_k": 0},
}
ARGUMENTS = shlex.split(
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 2 --global-batch-size 8 --train-iters 1000 --lr 1e-2 --lr-decay-style linear "
    "--eval-iters 0 --eval-interval 1000 --log-interval 1 --distributed-backend gloo --transformer-impl local "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion "
    "--no-bias-dropout-fusion --no-persist-layer-norm --tokenizer-type NullTokenizer --vocab-size 63 "
    "--use-distributed-optimizer --dataloader-type external --hidden-dropout 0 --attention-dropout 0 "
    "--no-rope-fusion --no-create-attention-mask-in-dataloader --normalization LayerNorm "
    "--make-vocab-size-divisible-by 16 --seed 7 --num-workers 0"
)


class Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences that can be learnt to different degrees: counting with a stride, some of it noise."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = (torch.arange(LENGTH + 1) * (1 + index % 3) + index) % VOCABULARY
        noise = torch.randint(VOCABULARY, (LENGTH + 1,), generator=generator)
        tokens = torch.where(
            torch.rand(LENGTH + 1, generator=generator) < index / 200, noise, tokens
        )
        return {"tokens": tokens[:-1], "labels": tokens[1:]}


seen: list[list[int]] = []
losses_seen: list[float] = []


def model_provider(pre_process: bool = True, post_process: bool = True, **_: Any) -> GPTModel:
    config = core_transformer_config_from_args(get_args())
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        VOCABULARY,
        LENGTH,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=False,
    )


def loss_of(hooks: Any, batch: Any, output: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    losses = hooks.handle.sample_losses(output, torch.ones_like(batch["labels"]))
    losses_seen.extend(losses.tolist())
    return hooks.handle.weigh(losses, batch["sample_id"]), {"lm loss": losses.detach().mean()}


def forward_step(hooks: Any, iterator: Any, model: Any) -> Any:
    batch = {}
    if is_pipeline_first_stage() or is_pipeline_last_stage():
        batch = next(iterator)
        seen.append(batch["sample_id"].tolist())
    positions = torch.arange(LENGTH).expand(2, LENGTH)
    output = model(batch.get("tokens"), positions, None, labels=batch.get("labels"))
    return output, partial(loss_of, hooks, batch)


def configured(arguments: Any) -> Any:
    """As Megatron-LM's own pretrain_gpt.py makes it."""
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )

    return pretrain_cfg_container_from_args(arguments, gpt_config_from_args(arguments))


def main() -> None:
    sys.argv[1:] = [
        *ARGUMENTS,
        *sys.argv[3:],
        "--save",
        str(OUT / "ckpt"),
        "--load",
        str(OUT / "ckpt"),
    ]
    cfg = effx.EffxConfig.from_dict(BLOCK)
    with effx.megatron.pretrain_hooks(cfg, Sequences) as hooks:
        try:
            pretrain(
                configured(parse_and_validate_args()),
                hooks.datasets(),
                ModelType.encoder_or_decoder,
                partial(forward_step, hooks),
                model_provider,
            )
        finally:  # --exit-interval leaves by sys.exit
            inner = hooks.handle.sampler.inner
            found = {
                "iteration": get_args().curr_iteration + 1,
                "seen": seen,
                "losses": losses_seen,
                "saved": inner.samples_saved,
                "epoch": inner.epoch,
            }
            OUT.mkdir(parents=True, exist_ok=True)
            (OUT / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
