"""This rank's losses of the current epoch: looked up, weighed and kept, without communication or host sync."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from effx_dist.errors import ConfigError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_NO_ID = torch.iinfo(torch.int64)


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


class LossRecorder:
    """One place for every planned sample of this rank: its weight, and its loss once it is known."""

    def __init__(
        self, local_ids: npt.NDArray[np.int64], local_weights: npt.NDArray[np.float32]
    ) -> None:
        self._ids = torch.from_numpy(local_ids)
        self._weights = torch.from_numpy(local_weights)
        self._tables: dict[torch.device, _Table] = {}
        # [num_local + 1]: NaN where no loss has come yet; the last place is a bin
        self._losses: torch.Tensor | None = None
        # one longer as well, on the losses' device
        self._device_weights: torch.Tensor | None = None
        self._unknown: torch.Tensor | None = None  # smallest and largest id that was not planned

    def weigh(self, losses: torch.Tensor, ids: torch.Tensor, consumed: int) -> torch.Tensor:
        """``sum(weight * loss) / batch``; keeps the losses. No communication, no host sync on an accelerator.

        Args:
            losses: ``[batch]``, any floating dtype, with its graph.
            ids: ``[batch]`` integers, on the host or on any device.
            consumed: Places of the plan that were weighed before: the batch is expected to follow them.
        """
        places = self._places(ids.detach().to(torch.int64), consumed)
        places = places.to(losses.device, non_blocking=True)
        kept, weights = self._buffers(losses.device)
        weight = weights[places]
        counts = weight > 0
        known = losses.detach().to(torch.float32)
        known = torch.where(known.isfinite(), known, torch.inf)  # NaN stands for "not yet"
        kept[torch.where(counts, places, len(self._ids))] = known
        # A pad must not pass on a NaN either, so its loss is taken out before it is multiplied by 0.
        wide = losses.to(torch.promote_types(losses.dtype, torch.float32))
        return (weight * torch.where(counts, wide, 0)).sum() / losses.numel()

    def take(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Ids and losses recorded since the last call (infinity for a loss that was not finite), and forget them.

        Called between epochs or before a save; waits for the device.

        Raises:
            ConfigError: Ids were weighed that this rank's plan does not hold.
        """
        if self._unknown is not None:
            low, high = self._unknown.tolist()
            if high >= low:
                raise _unknown_ids([low] if low == high else [low, high])
        if self._losses is None:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        losses = self._losses[:-1].cpu().numpy()
        is_recorded = ~np.isnan(losses)
        taken = self._ids.numpy()[is_recorded], losses[is_recorded]
        self._losses.fill_(torch.nan)
        return taken

    def _places(self, ids: torch.Tensor, consumed: int) -> torch.Tensor:
        end = consumed + len(ids)
        expected = torch.arange(consumed, end, device=ids.device)
        if ids.device.type == "cpu":
            if torch.equal(self._ids[consumed:end], ids):
                return expected
            places = self._match(ids, expected)
            if bool((places == len(self._ids)).any()):
                raise _unknown_ids(ids[places == len(self._ids)].tolist())
            return places
        places = self._match(ids, expected)
        self._note_unknown(ids, places == len(self._ids))
        return places

    def _match(self, ids: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """The expected place where the id is the planned one, which tells a pad from its sample; else by search."""
        table = self._table(ids.device)
        places = table.find(ids)
        if len(self._ids) == 0:
            return places
        planned = table.ids[expected.clamp(max=len(self._ids) - 1)]
        is_in_order = (planned == ids) & (expected < len(self._ids))
        return torch.where(is_in_order, expected, places)

    def _note_unknown(self, ids: torch.Tensor, is_unknown: torch.Tensor) -> None:
        """Remember the extreme unknown ids on the device; reading them here would make the host wait."""
        low = torch.where(is_unknown, ids, _NO_ID.max).amin()
        high = torch.where(is_unknown, ids, _NO_ID.min).amax()
        if self._unknown is not None:
            low = torch.minimum(low, self._unknown[0])
            high = torch.maximum(high, self._unknown[1])
        self._unknown = torch.stack([low, high])

    def _table(self, device: torch.device) -> _Table:
        if device not in self._tables:
            is_pad = self._weights == 0
            self._tables[device] = _Table.build(self._ids.to(device), is_pad.to(device))
        return self._tables[device]

    def _buffers(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self._losses is None or self._device_weights is None:
            self._losses = torch.full((len(self._ids) + 1,), torch.nan, device=device)
            self._device_weights = torch.cat([self._weights, torch.zeros(1)]).to(device)
        elif self._losses.device != device:
            self._losses = self._losses.to(device)
            self._device_weights = self._device_weights.to(device)
        return self._losses, self._device_weights


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
        f"sample_ids {shown}: not among the samples that this rank has in this epoch; pass the ids that the sampler "
        "gave for this batch (with_sample_ids puts them into it), and weigh a batch before the next epoch begins"
    )
