"""Loss on held-out text, the same number at every world size."""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import default_collate

from effx_dist import sequence_losses
from launch.llama.blocks import BlockDataset


@torch.no_grad()
def held_out_loss(
    model: nn.Module, dataset: BlockDataset, batch_size: int, device: torch.device
) -> float:
    """Mean loss per token over the whole of `dataset`, in nats.

    Every rank takes every world-size-th sample; sums and counts are all-reduced once at the end.
    A sharded forward pass is a collective, so all ranks make the same number of them.
    """
    rank, world = _rank_and_world()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for batch, is_counted in held_out_batches(dataset, batch_size, rank, world):
        inputs, labels = (batch[name].to(device) for name in ("input_ids", "labels"))
        losses = sequence_losses(model(input_ids=inputs).logits, labels)
        if is_counted:
            totals += loss_totals(losses, labels)
    model.train(was_training)
    if world > 1:
        dist.all_reduce(totals)
    return float(totals[0] / totals[1])


def held_out_batches(
    dataset: BlockDataset, batch_size: int, rank: int, world: int
) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
    """The batches of one of `world` ranks that share out `dataset`, and whether each counts.

    All ranks get the same number of them: one that has run out repeats a sample, uncounted.
    """
    num_samples = len(dataset)
    local_ids = list(range(rank, num_samples, world))
    for batch in range(math.ceil(math.ceil(num_samples / world) / batch_size)):
        ids = local_ids[batch * batch_size : (batch + 1) * batch_size]
        yield default_collate([dataset[index] for index in ids or [0]]), bool(ids)


def loss_totals(losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """float64[2]: the sum of the token losses behind losses[batch], and the number of targets."""
    counts = (labels != -100).sum(dim=1).double()
    return torch.stack([(losses.double() * counts).sum(), counts.sum()])


def _rank_and_world() -> tuple[int, int]:
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
