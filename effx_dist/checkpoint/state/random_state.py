"""States of the random generators of this process, as tensors, and back."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch


def random_state() -> dict[str, torch.Tensor]:
    """States of Python's, NumPy's, torch's and the current accelerator's global generators."""
    python = random.getstate()
    keys, position, has_gauss, gauss = tuple(np.random.get_state(legacy=True))[1:5]
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python[1], dtype=torch.int64),
        "numpy": torch.from_numpy(
            np.concatenate([np.asarray(keys, dtype=np.int64), [position, has_gauss]])
        ),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
    }
    if python[2] is not None:
        found["python_gauss"] = torch.tensor(python[2], dtype=torch.float64)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """The way back; generators without a saved state are left as they are."""
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "python" in state:
        gauss = state.get("python_gauss")
        random.setstate(
            (3, tuple(state["python"].tolist()), None if gauss is None else gauss.item())
        )
    if "numpy" in state:
        *keys, position, has_gauss = state["numpy"].tolist()
        gauss_value = state["numpy_gauss"].item()
        np.random.set_state(
            ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss_value)
        )
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
