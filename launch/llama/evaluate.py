"""Loss on held-out text, the same number at every world size."""

import math

import torch
import torch.distributed as dist
from torch import nn

from effx_dist import sequence_losses
from launch.llama.blocks import BlockDataset


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    dataset: BlockDataset,
    batch_size: int,
    device: torch.device,
) -> float:
    """Mean loss per token over the whole of `dataset`, in nats.

    Every rank takes every world-size-th sample; sums and counts are all-reduced once at the end.
    A sharded forward pass is a collective, so all ranks make the same number of them: a rank
    that has run out repeats a sample and counts it as nothing.
    """
    rank, world = _rank_and_world()
    num_samples = len(dataset)
    local_ids = list(range(rank, num_samples, world))
    num_batches = math.ceil(math.ceil(num_samples / world) / batch_size)
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for batch in range(num_batches):
        ids = local_ids[batch * batch_size : (batch + 1) * batch_size]
        samples = [dataset[index] for index in ids or [0]]
        inputs = torch.stack([sample["input_ids"] for sample in samples]).to(device)
        labels = torch.stack([sample["labels"] for sample in samples]).to(device)
        losses = sequence_losses(model(input_ids=inputs).logits, labels).double()
        counts = (labels != -100).sum(dim=1).double()
        if ids:
            totals += torch.stack([(losses * counts).sum(), counts.sum()])
    model.train(was_training)
    if world > 1:
        dist.all_reduce(totals)
    return float(totals[0] / totals[1])


def _rank_and_world() -> tuple[int, int]:
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
