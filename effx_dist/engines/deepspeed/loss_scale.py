"""DeepSpeed's dynamic loss scale, as a state that travels with a checkpoint."""

from __future__ import annotations

from typing import Any

SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScaler:
    """A dynamic loss scale of fp16, as something with a state."""

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        """Scale and counters, those that this scaler has."""
        return {
            key: getattr(self._scaler, key) for key in SCALER_KEYS if hasattr(self._scaler, key)
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        for key in self.state_dict().keys() & state_dict.keys():
            setattr(self._scaler, key, state_dict[key])


def scaler_of(optimizer: Any) -> Any:
    """What holds the dynamic loss scale, with ZeRO or without; None where there is none."""
    for name, is_dynamic in (
        ("loss_scaler", "dynamic"),
        ("loss_scale_config", "dynamic_loss_scale"),
    ):
        scaler = getattr(optimizer, name, None)
        if getattr(scaler, is_dynamic, False):
            return scaler
    return None
