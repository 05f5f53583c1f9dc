"""Micro-batches of the samples that InfoBatch keeps, with the habits of Megatron's own batch samplers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from torch.utils.data import Sampler

from effx_dist.config import InfoBatchConfig
from effx_dist.data import InfoBatchSampler
from effx_dist.data.peers import Peers
from effx_dist.data.plan import EpochPlan
from effx_dist.data.slots import whole_number
from effx_dist.errors import ConfigError
from effx_dist.forwarded import Forwarded
from effx_dist.shard import Group, TorchGroup, as_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CONSUMED = "consumed_samples"


class InfoBatchPretrainingSampler(Sampler[list[int]]):
    """Micro-batches of sample ids for one data-parallel rank, in the place of MegatronPretrainingSampler::

        sampler = InfoBatchPretrainingSampler(
            len(dataset), consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size,
            config=InfoBatchConfig(num_epochs=4), global_batch_size=64,
        )
        loader = DataLoader(with_sample_ids(dataset), batch_sampler=sampler)
        for epoch in range(sampler.epoch, 4):
            sampler.set_epoch(epoch)                            # on every rank, outside the schedule
            for batch in ...

    What is left out, the weights and the plans are those of `InfoBatchSampler`, which is found as ``inner``. Every
    tensor-, pipeline- and context-parallel rank of one data-parallel coordinate gets the same micro-batches.

    **Communication.** `set_epoch`, `state_dict` and `load_state_dict` are collectives of all ranks: data-parallel ranks
    plan together, and before that the losses of the last pipeline stage are sent to the other ranks of the same model.
    The first of `set_epoch`, `len`, `iter` and `plan` plans the first epoch and is one too. Nothing else communicates;
    a later epoch never begins by itself, as ranks within a pipeline schedule must not wait for all others.

    Args:
        total_samples: Samples of the data set, over all ranks.
        consumed_samples: Samples that all ranks together have trained on before, in the whole run. Where a state is
            loaded that says how many, it must be the same, or 0. Without a state it can only lie within the first
            epoch, which needs no scores: it then goes on from there.
        micro_batch_size: Samples of one micro-batch of one rank.
        data_parallel_rank: This rank's number among those that see different samples.
        data_parallel_size: Their number, context-parallel ranks not counted.
        drop_last: See InfoBatchSampler; None: as ``config`` says.
        config: The "infobatch" section.
        global_batch_size: Samples of one optimizer step, over all ranks.
        group: The data-parallel ranks, without context parallelism; None: those of ``parallel_state``.
        peers: The ranks that get the same samples; None: those of ``parallel_state``, or none where ``group`` is given.

    Raises:
        ConfigError: A value is out of its range or contradicts another; ``group`` is None and megatron.core's
            parallel_state is not initialised. When the first epoch is planned: ``consumed_samples`` lies beyond it.
    """

    def __init__(
        self,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        drop_last: bool | None = None,
        *,
        config: InfoBatchConfig,
        global_batch_size: int,
        group: Group | ProcessGroup | None = None,
        peers: Peers | None = None,
    ) -> None:
        if group is None:
            group, found_peers = groups_of_parallel_state()
            peers = found_peers if peers is None else peers
        group = as_group(group)
        if (group.rank, group.size) != (data_parallel_rank, data_parallel_size):
            raise ConfigError(
                f"data_parallel_rank={data_parallel_rank}, data_parallel_size={data_parallel_size}: the data-parallel "
                f"group has this rank as {group.rank} of {group.size}; pass those of "
                "parallel_state.get_data_parallel_group()"
            )
        if drop_last is not None:
            config = config.model_copy(update={"drop_last": drop_last})
        self.micro_batch_size = whole_number("micro_batch_size", micro_batch_size)
        self.global_batch_size = whole_number("global_batch_size", global_batch_size)
        self._given = whole_number(CONSUMED, consumed_samples, at_least=0)
        per_pass = self.micro_batch_size * group.size
        for name, value, unit in (
            ("global_batch_size", global_batch_size, per_pass),
            (CONSUMED, consumed_samples, self.global_batch_size),
        ):
            if value % unit:
                raise ConfigError(
                    f"{name}={value}: must be a multiple of {unit}; micro_batch_size x data_parallel_size is "
                    f"{per_pass}, global_batch_size {global_batch_size}"
                )
        self.inner = InfoBatchSampler.from_config(
            config,
            total_samples,
            self.micro_batch_size,
            self.global_batch_size // per_pass,
            group,
            peers,
        )
        self._is_to_skip = consumed_samples > 0
        self._num_before = 0  # consumed in the epochs before this one
        self._was_epoch_set = False

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch``, as InfoBatchSampler.set_epoch; nothing if it is the current one. Collective.

        Raises:
            ConfigError: See InfoBatchSampler; and ranks of one model have consumed different numbers of samples.
        """
        self._skip_what_was_consumed()
        epoch_before, consumed = self.inner.epoch, self.consumed_samples
        self.inner.set_epoch(epoch)
        if self.inner.epoch != epoch_before:
            self._num_before = consumed
        self._was_epoch_set = True

    def __iter__(self) -> Iterator[list[int]]:
        """A fresh iterator over the micro-batches of the current epoch that this rank has not weighed.

        Raises:
            ConfigError: All were weighed, and `set_epoch` was not called since the last `iter`.
        """
        self._skip_what_was_consumed()
        if not self.inner.num_remaining and not self._was_epoch_set:
            raise ConfigError(
                f"epoch {self.epoch} has ended: call set_epoch({self.epoch + 1}) on every rank, between two steps, "
                "before the loader is iterated again"
            )
        self._was_epoch_set = False
        return _micro_batches(self.inner.hand_out(), self.micro_batch_size)

    def __len__(self) -> int:
        """Micro-batches of this rank in the whole current epoch."""
        self._skip_what_was_consumed()
        return len(self.inner) // self.micro_batch_size

    @property
    def plan(self) -> EpochPlan:
        """The current epoch's plan for this rank; see `InfoBatchSampler.plan`."""
        self._skip_what_was_consumed()
        return self.inner.plan

    def weigh(self, losses: torch.Tensor, sample_ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """See InfoBatchSampler.weigh: on the last pipeline stage, for every micro-batch. No communication."""
        return self.inner.weigh(losses, sample_ids)

    def end_epoch(self) -> None:
        """Declare that the epoch ends here on purpose; see InfoBatchSampler.end_epoch. On every rank."""
        self.inner.end_epoch()

    def check_epoch(self) -> None:
        """Raise what is wrong with the last epoch; see InfoBatchSampler.check_epoch. Collective."""
        self.inner.check_epoch()

    def advance(self) -> None:
        """Count one optimizer step where no losses are weighed: on every pipeline stage but the last, nothing on that.

        Called after each step on every rank, or at least before `progress` is read. No communication is performed.
        """
        if not self.inner.peers.has_losses:
            self.inner.advance(self.global_batch_size // self.inner.group.size)

    def _skip_what_was_consumed(self) -> None:
        """Go on within the first epoch, where no state was loaded that says more. Collective, once."""
        if not self._is_to_skip:
            return
        end = self.inner.plan.span.end
        if self._given >= end:
            raise ConfigError(
                f"{CONSUMED}={self._given}: lies beyond the first epoch, of {end} samples, and later ones are planned "
                "from the losses of those before; load the sampler's state with the checkpoint"
            )
        self.inner.load_state_dict({**self.inner.state_dict(), "position": self._given})
        self._is_to_skip = False

    @property
    def consumed_samples(self) -> int:
        """Samples that all ranks together have trained on in the whole run, as Megatron counts them."""
        return self._given if self._is_to_skip else self._num_before + self.inner.position

    total_samples = Forwarded[int]("inner.num_samples")
    """Samples of the data set."""

    epoch = Forwarded[int]("inner.epoch")
    """The current epoch, from 0."""

    progress = Forwarded[float]("inner.progress")
    """Data consumed, in epochs; the same on all ranks between two steps."""

    kept_fraction = Forwarded[float]("inner.kept_fraction")
    """Fraction of all samples that the current plan keeps; 1.0 in a full epoch."""

    threshold_value = Forwarded[float | None]("inner.threshold_value")
    """Score below which samples of this epoch may have been left out; None in an epoch that is not pruned."""

    samples_saved = Forwarded[int]("inner.samples_saved")
    """Samples left out by pruning in the run so far, the whole of the current epoch included."""

    def state_dict(self) -> dict[str, Any]:
        """The state of the inner sampler, and ``consumed_samples``. Collective; the same on the ranks of one model."""
        self._skip_what_was_consumed()
        state = self.inner.state_dict()
        return {**state, CONSUMED: self.consumed_samples}

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on where a run stood, at the same or another number of data-, tensor- and pipeline-parallel ranks.

        Takes the states of `InfoBatchSampler` under other engines too; they do not say ``consumed_samples``, and what
        the sampler was given counts then. Collective.

        Raises:
            ConfigError: ``consumed_samples`` was given, and the state has another one. See InfoBatchSampler.
        """
        states = [state] if isinstance(state, Mapping) else list(state)
        inner, given = self.inner, self._given
        told = states[0].get(CONSUMED) if states else None
        error: ConfigError | None = None
        if told is not None and (not isinstance(told, int) or isinstance(told, bool) or told < 0):
            error = ConfigError(
                f'"{CONSUMED}" is {told!r} in the sampler\'s state: must be a number of samples'
            )
        elif told is not None and given not in (0, told):
            error = ConfigError(
                f"{CONSUMED}={given}, but the loaded state has {told}: give the sampler that number, or 0 to go by the "
                "state"
            )
        inner.group.tell_all(inner.peers.agree(error), None)
        inner.load_state_dict(states)
        consumed = max(given, inner.position) if told is None else told
        self._num_before = consumed - inner.position
        self._is_to_skip, self._was_epoch_set = False, False


def groups_of_parallel_state() -> tuple[Group, Peers]:
    """The data-parallel ranks, without context parallelism, and the ranks that get the same samples as this one.

    The last pipeline stage has losses, and its first tensor- and context-parallel rank reports them. No communication
    is performed.

    Raises:
        ConfigError: megatron.core's parallel_state is not initialised.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise ConfigError(
            "group=None: megatron.core.parallel_state is not initialised; call initialize_model_parallel first, or "
            "pass the data-parallel ranks as group"
        )
    has_losses = bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))
    is_first = (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )
    groups = (
        TorchGroup(parallel_state.get_model_parallel_group()),
        TorchGroup(parallel_state.get_context_parallel_group()),
    )
    several = tuple(group for group in groups if group.size > 1)
    peers = Peers(several, is_reporter=has_losses and is_first, has_losses=has_losses)
    return TorchGroup(parallel_state.get_data_parallel_group()), peers


def _micro_batches(ids: Iterator[int], size: int) -> Iterator[list[int]]:
    while batch := list(islice(ids, size)):
        yield batch
