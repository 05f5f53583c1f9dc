"""This rank's losses of the current epoch: looked up, weighed and kept, without communication or host sync."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from effx_dist.errors import ConfigError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_NO_ID = torch.iinfo(torch.int64)
HOW_IDS_TRAVEL = (
    "pass the ids that the sampler gave for this batch (with_sample_ids puts them into it), and weigh a batch before "
    "the next epoch begins"
)
"""What an error about ids says that one should do."""


@dataclass(frozen=True, eq=False)
class _Table:
    """The planned ids on one device, and where to find each: ``keys`` ascending, ``keys[i] >> 1`` stands at place
    ``places[i]``. A real occurrence (even key) sorts before a pad of the same id (odd key)."""

    ids: torch.Tensor
    keys: torch.Tensor
    places: torch.Tensor

    @classmethod
    def build(cls, ids: torch.Tensor, is_pad: torch.Tensor) -> _Table:
        keys, order = torch.sort(ids * 2 + is_pad)
        last = torch.tensor([_NO_ID.max], device=ids.device)
        return cls(ids, torch.cat([keys, last]), torch.cat([order, last * 0 + len(ids)]))

    def find(self, ids: torch.Tensor) -> torch.Tensor:
        """Place of each id, or ``len(self.ids)`` where it is not planned."""
        found = torch.searchsorted(self.keys, ids * 2)
        is_known = self.keys[found] >> 1 == ids
        return torch.where(is_known, self.places[found], len(self.ids))

    def find_pads(self, ids: torch.Tensor) -> torch.Tensor:
        """Place of a pad of each id, or ``len(self.ids)`` where it has none."""
        found = torch.searchsorted(self.keys, ids * 2 + 1)
        return torch.where(self.keys[found] == ids * 2 + 1, self.places[found], len(self.ids))


@dataclass(frozen=True)
class Strays:
    """Samples that were weighed and should not have been."""

    low: int
    """Smallest and largest id that is not of this rank's plan; ``low > high`` if there was none."""
    high: int
    num_not_given: int
    """How often a sample was weighed that the sampler had not handed out by then."""


_NO_STRAYS = Strays(_NO_ID.max, _NO_ID.min, 0)


class LossRecorder:
    """One place for every planned sample of this rank: its weight, whether it was weighed, and its loss."""

    def __init__(
        self,
        local_ids: npt.NDArray[np.int64],
        local_weights: npt.NDArray[np.float32],
        is_strict: bool = True,
    ) -> None:
        self._is_strict = is_strict
        self._ids = torch.from_numpy(local_ids)
        self._num_local = len(local_ids)
        self._weights = torch.from_numpy(local_weights)
        self._has_pads = bool((local_weights == 0).any())
        self._tables: dict[torch.device, _Table] = {}
        # [num_local + 1] bits on each device that ids came on; the last place is a bin
        self._weighed: dict[torch.device, torch.Tensor] = {}
        # [num_local + 1]: NaN where no loss has come yet
        self._losses: torch.Tensor | None = None
        # one longer as well, on the losses' device
        self._device_weights: torch.Tensor | None = None
        self._strays: torch.Tensor | None = None  # see Strays; on the device of the ids
        self._next = 0  # the place after the batch that was weighed last
        self._batches: dict[int, tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}
        self.num_weighed = 0
        """Places that were weighed. Where ids are on an accelerator, an estimate until `weighed` is called: a batch
        that is weighed again counts again if its ids come in a new tensor."""

    def weigh(
        self,
        losses: torch.Tensor,
        ids: torch.Tensor,
        num_given: int | None = None,
        user_weights: torch.Tensor | None = None,
        divisor: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``sum(weight * loss) / batch``; keeps the losses. No communication, no host sync on an accelerator.

        Args:
            losses: ``[batch]``, any floating dtype, with its graph.
            ids: ``[batch]`` integers, on the host or on any device.
            num_given: Places that the sampler has handed out; None: it is not known.
            user_weights: ``[batch]``, multiplied to the weights of the plan; the losses are kept without them.
            divisor: In the place of ``batch``.

        Raises:
            ConfigError: Ids on the host are not planned, and the recorder is strict; nothing is recorded then.
        """
        places = self._places(ids, num_given).to(losses.device, non_blocking=True)
        kept, weights = self._buffers(losses.device)
        weight = weights[places]
        counts = weight > 0
        known = losses.detach().to(torch.float32)
        known = torch.where(known.isfinite(), known, torch.inf)  # NaN stands for "not yet"
        kept[torch.where(counts, places, self._num_local)] = known
        # A pad must not pass on a NaN either, so its loss is taken out before it is multiplied by 0.
        wide = losses.to(torch.promote_types(losses.dtype, torch.float32))
        if user_weights is not None:
            weight = weight * user_weights.to(device=losses.device, dtype=torch.float32)
        return (weight * torch.where(counts, wide, 0)).sum() / (
            losses.numel() if divisor is None else divisor
        )

    def weighed(self) -> npt.NDArray[np.bool_]:
        """Which places were weighed, ``[num_local]``. Waits for the device."""
        found = np.zeros(self._num_local, dtype=np.bool_)
        for bits in self._weighed.values():
            found |= bits[:-1].cpu().numpy()
        self.num_weighed = int(np.count_nonzero(found))
        return found

    def mark(self, places: npt.NDArray[np.int64]) -> None:
        """Note places as weighed elsewhere: they have no loss here."""
        self._bits(self._ids.device)[torch.from_numpy(places)] = True
        self.num_weighed = int(np.count_nonzero(self.weighed()))

    def take_over(self, losses: torch.Tensor | None, num_weighed: int) -> None:
        """Take up what a recorder of an earlier release held: ``[num_local + 1]`` losses, and how many places were
        weighed, from the first on."""
        self._losses = losses
        if losses is not None:
            self._device_weights = torch.cat([self._weights, torch.zeros(1)]).to(losses.device)
        self.mark(np.arange(num_weighed, dtype=np.int64))
        self._next = num_weighed

    def recorded(self) -> npt.NDArray[np.float32]:
        """The losses, ``[num_local]``: NaN where there is none, infinity where it was not finite. A copy; waits for
        the device."""
        if self._losses is None:
            return np.full(self._num_local, np.nan, dtype=np.float32)
        return self._losses[:-1].to("cpu", copy=True).numpy()

    def taken(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Ids and losses of what was recorded. Waits for the device."""
        losses = self.recorded()
        is_recorded = ~np.isnan(losses)
        return self._ids.numpy()[is_recorded], losses[is_recorded]

    def strays(self) -> Strays:
        """What was weighed and should not have been. Waits for the device."""
        return _NO_STRAYS if self._strays is None else Strays(*self._strays.tolist())

    def _places(self, batch: torch.Tensor, num_given: int | None) -> torch.Tensor:
        """The place of each id, ``self._num_local`` where it is not planned; they are noted as weighed."""
        if (places := self._places_again(batch)) is not None:
            return places
        ids, start = batch.detach().to(torch.int64), self._next
        end = start + len(ids)
        is_host = ids.device.type == "cpu"
        is_next = is_host and torch.equal(self._ids[start:end], ids)
        if is_next and self._has_pads:
            is_next = not bool(self._bits(ids.device)[start:end].any())
        places = torch.arange(start, end, device=ids.device)
        if not is_next:
            places = self._match(ids, places)
        if not is_next or (num_given is not None and num_given < end):
            if is_host and self._is_strict and bool((places == self._num_local).any()):
                raise _unknown_ids(ids[places == self._num_local].tolist())
            self._note_strays(ids, places, num_given)
        self._remember(batch, places)
        self._next = min(end, self._num_local)
        self._note_weighed(places, start if is_next else None)
        return places

    def _note_weighed(self, places: torch.Tensor, start: int | None) -> None:
        """Set the bits of places, which follow each other from ``start`` on where that is given."""
        bits = self._bits(places.device)
        if start is not None:
            here = bits.numpy()[start : start + len(places)]  # on the host, where this is faster
            self.num_weighed += here.size - int(np.count_nonzero(here))
            here[:] = True
        elif places.device.type == "cpu":
            new = places[~bits[places]]
            self.num_weighed += int(new[new < self._num_local].unique().numel())
            bits[places] = True
        else:
            self.num_weighed = min(self.num_weighed + len(places), self._num_local)
            bits[places] = True

    def _places_again(self, batch: torch.Tensor) -> torch.Tensor | None:
        """The places of a batch that is weighed again (a closure, a second pass): the same tensor, unchanged."""
        known = self._batches.get(id(batch))
        if known is None or known[0]() is not batch or known[1] != _version(batch):
            return None
        return known[2]

    def _remember(self, batch: torch.Tensor, places: torch.Tensor) -> None:
        key, batches = id(batch), self._batches
        gone = weakref.ref(batch, lambda _: batches.pop(key, None))
        batches[key] = (gone, _version(batch), places)

    def _match(self, ids: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """The expected place where the id is the planned one, which tells a pad from its sample; else by search."""
        table = self._table(ids.device)
        places = table.find(ids)
        if self._num_local == 0:
            return places
        planned = table.ids[expected.clamp(max=self._num_local - 1)]
        is_in_order = (planned == ids) & (expected < self._num_local)
        if self._has_pads:  # by chance, a pad would be taken for its sample, or a sample twice
            is_weighed = self._bits(ids.device)[expected.clamp(max=self._num_local)]
            is_in_order = is_in_order.all() & ~is_weighed.any()
            places = self._with_pads(ids, places)
        return torch.where(is_in_order, expected, places)

    def _with_pads(self, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """In batches of any order, what comes first of an id is the sample, and what comes again is its pad."""
        table, bits = self._table(ids.device), self._bits(ids.device)
        pads = table.find_pads(ids)
        is_again = (ids[:, None] == ids[None, :]).tril(-1).any(dim=1) | bits[places]
        return torch.where(is_again & (pads < self._num_local) & ~bits[pads], pads, places)

    def _note_strays(self, ids: torch.Tensor, places: torch.Tensor, num_given: int | None) -> None:
        """Remember, on the device, what should not have come; reading it here would make the host wait."""
        is_unknown = places == self._num_local
        low = torch.where(is_unknown, ids, _NO_ID.max).amin()
        high = torch.where(is_unknown, ids, _NO_ID.min).amax()
        not_given = torch.zeros_like(low)
        if num_given is not None:
            not_given = ((places >= num_given) & ~is_unknown).sum()
        if self._strays is not None:
            before = self._strays.to(ids.device)
            low, high = torch.minimum(low, before[0]), torch.maximum(high, before[1])
            not_given = not_given + before[2]
        self._strays = torch.stack([low, high, not_given])

    def _table(self, device: torch.device) -> _Table:
        if device not in self._tables:
            is_pad = self._weights == 0
            self._tables[device] = _Table.build(self._ids.to(device), is_pad.to(device))
        return self._tables[device]

    def _bits(self, device: torch.device) -> torch.Tensor:
        if device not in self._weighed:
            self._weighed[device] = torch.zeros(
                self._num_local + 1, dtype=torch.bool, device=device
            )
        return self._weighed[device]

    def _buffers(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self._losses is None or self._device_weights is None:
            self._losses = torch.full((self._num_local + 1,), torch.nan, device=device)
            self._device_weights = torch.cat([self._weights, torch.zeros(1)]).to(device)
        elif self._losses.device != device:
            self._losses = self._losses.to(device)
            self._device_weights = self._device_weights.to(device)
        return self._losses, self._device_weights

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_batches": {}}  # the tensors of other processes are others


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def as_ids(sample_ids: torch.Tensor | Sequence[int], losses: torch.Tensor) -> torch.Tensor:
    """``sample_ids`` as an integer tensor that fits ``losses``.

    Raises:
        ConfigError: ``losses`` is not a ``[batch]`` of floating numbers, the ids are not integers, or the lengths
            differ.
    """
    if losses.dim() != 1 or not losses.is_floating_point() or not losses.numel():
        raise ConfigError(
            f"losses of shape {tuple(losses.shape)} and {losses.dtype}: must be one floating loss a sample, [batch]; "
            'compute them with reduction="none" or sequence_losses'
        )
    ids = sample_ids if isinstance(sample_ids, torch.Tensor) else torch.tensor(list(sample_ids))
    if ids.dtype not in _INTEGERS:
        raise ConfigError(
            f"sample_ids of {ids.dtype}: must be integers; a float holds them exactly only below 2**24 (float32)"
        )
    if ids.shape != losses.shape:
        raise ConfigError(
            f"sample_ids of shape {tuple(ids.shape)} for losses of shape {tuple(losses.shape)}: one id a loss is needed"
        )
    return ids


def _unknown_ids(ids: list[int]) -> ConfigError:
    shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    return ConfigError(
        f"sample_ids {shown}: not among the samples that this rank has in this epoch; {HOW_IDS_TRAVEL}"
    )
