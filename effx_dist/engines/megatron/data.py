"""InfoBatch under Megatron-core: per-sample losses, how they are weighed, and a learning rate that follows the data.

`DataFeed` is the part of the handle that deals with samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

from effx_dist.config import InfoBatchConfig
from effx_dist.engines.feed import Feed
from effx_dist.engines.megatron.pretraining_sampler import (
    InfoBatchPretrainingSampler,
    groups_of_parallel_state,
)
from effx_dist.errors import ConfigError, LayoutMismatchError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sample_losses(
    output_tensor: torch.Tensor, loss_mask: torch.Tensor, context_group: ProcessGroup | None = None
) -> torch.Tensor:
    """Mean loss of each sequence over its own target tokens: ``[micro_batch]``, float32.

    A sequence without any target gives 0, with a zero gradient.

    Under context parallelism each rank has a part of every sequence: sums and counts are all-reduced over the group
    (two small all-reduces), so that all ranks get the losses of whole sequences; their gradient is that of this
    rank's part. Megatron multiplies the loss by the context-parallel size and averages gradients over those ranks
    as well, which adds the parts up.

    Args:
        output_tensor: ``[micro_batch, sequence]``: what GPTModel gives when it is called with labels.
        loss_mask: As many numbers as ``output_tensor``: 1 for a target, 0 elsewhere.
        context_group: The context-parallel ranks; None: those of ``parallel_state``, if there are several.

    Raises:
        LayoutMismatchError: The shapes do not belong together.
    """
    if output_tensor.dim() != 2 or loss_mask.numel() != output_tensor.numel():
        raise LayoutMismatchError(
            f"output_tensor {tuple(output_tensor.shape)} and loss_mask {tuple(loss_mask.shape)}: must both be "
            "[micro_batch, sequence]; call the model with labels, and return its output as it is from forward_step"
        )
    mask = loss_mask.view(output_tensor.shape).to(torch.float32)
    sums = torch.where(mask > 0, output_tensor.float() * mask, 0).sum(dim=1)
    counts = mask.sum(dim=1)
    if context_group is None and parallel_state.model_parallel_is_initialized():
        context_group = parallel_state.get_context_parallel_group()
    if context_group is not None and context_group.size() > 1:
        counts = reduce_from_tensor_model_parallel_region(counts, group=context_group)
        sums = reduce_from_tensor_model_parallel_region(sums, group=context_group)
    return sums / counts.clamp(min=1)


def check_loss_reduction(model_configs: Iterable[Any]) -> None:
    """Refuse what per-sample weights cannot be right under. No communication is performed.

    Raises:
        ConfigError: ``calculate_per_token_loss`` is set in one of the models' configurations.
    """
    if any(getattr(config, "calculate_per_token_loss", False) for config in model_configs):
        raise ConfigError(
            "calculate_per_token_loss=True: Megatron then divides the gradient by the number of target tokens that the "
            "kept samples happen to have, which InfoBatch's weights do not know of, so that it would no longer be that "
            "of the full data in expectation; must be False with effx.infobatch"
        )


class DataFeed(Feed[InfoBatchPretrainingSampler]):
    """Makes the sampler of a run, weighs its losses, and has the learning rate follow the data.

    Args:
        config: The "infobatch" section; None, or one that is not enabled: no sampler can be made.
        model_configs: The models' TransformerConfigs.

    Raises:
        ConfigError: See `check_loss_reduction`.
    """

    how_to_make_one = "make one with handle.make_sampler(total_samples, ...)"

    def __init__(self, config: InfoBatchConfig | None, model_configs: Iterable[Any] = ()) -> None:
        super().__init__(config)
        if self._infobatch is not None:
            check_loss_reduction(model_configs)

    def make_sampler(
        self,
        total_samples: int,
        consumed_samples: int = 0,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        drop_last: bool | None = None,
    ) -> InfoBatchPretrainingSampler:
        """The run's sampler, over the groups of ``parallel_state``. No communication is performed.

        Raises:
            ConfigError: The section is absent or off; see InfoBatchPretrainingSampler.
        """
        section = self._section
        group, peers = groups_of_parallel_state()
        self.sampler = InfoBatchPretrainingSampler(
            total_samples,
            consumed_samples,
            micro_batch_size,
            group.rank,
            group.size,
            drop_last,
            config=section,
            global_batch_size=global_batch_size,
            group=group,
            peers=peers,
        )
        return self.sampler

    def sample_losses(self, output_tensor: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
        """See `sample_losses`, over the context-parallel ranks of ``parallel_state``."""
        return sample_losses(output_tensor, loss_mask)

    def weigh(self, losses: torch.Tensor, sample_ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Record the losses of a micro-batch; the scalar that Megatron's ``loss_func`` returns first, of two values::

            def loss_func(loss_mask, sample_ids, output_tensor):
                losses = handle.sample_losses(output_tensor, loss_mask)
                return handle.weigh(losses, sample_ids), {"lm loss": losses.detach().mean()}

        Megatron divides it by the number of micro-batches and multiplies it by the context-parallel size itself. With a
        third value, a number of tokens, it would divide by that as well: there must be none.

        Losses that need no gradient are those of an evaluation (under torch.no_grad): their mean, and nothing is
        recorded. So is the mean, in float32 or wider, where InfoBatch is off. No communication is performed.

        Args:
            losses: ``[micro_batch]``, one loss a sample.
            sample_ids: ``[micro_batch]`` integers, as the sampler gave them.

        Raises:
            ConfigError: There is no sampler yet; see InfoBatchSampler.weigh.
        """
        return self._weigh(losses, sample_ids, is_training=losses.requires_grad)

    def advance(self, opt_param_scheduler: Any = None) -> None:
        """Count the samples of an optimizer step, and set its learning rate. On every rank, after the step's forward
        and backward passes, in the place of ``opt_param_scheduler.step(increment)``.

        Under pruning an epoch has fewer steps than samples promise. The schedule is therefore brought to
        ``progress x total_samples`` samples, so that with ``lr_decay_steps = num_epochs x total_samples`` it ends when
        the data do. Called before ``optimizer.step()``, the first step of a warm-up is not taken at rate 0; Megatron
        itself does it afterwards. No communication is performed.

        Raises:
            ConfigError: There is no sampler yet.
        """
        sampler = self._required_sampler("advance")
        sampler.advance()
        if opt_param_scheduler is not None:
            come = round(sampler.progress * sampler.total_samples)
            opt_param_scheduler.step(increment=come - opt_param_scheduler.num_steps)
