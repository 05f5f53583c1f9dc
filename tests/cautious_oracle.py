"""The papers' formulas in float64 NumPy, written without a look at the code under test."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass
class Settings:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    cautious_weight_decay: bool = False
    maximize: bool = False


@dataclass
class State:
    p: Array
    step: int = 0
    m: Array = field(init=False)
    v: Array = field(init=False)
    mask_mean: float = float("nan")

    def __post_init__(self) -> None:
        self.m = np.zeros_like(self.p)
        self.v = np.zeros_like(self.p)


def _masked_step(state: State, u: Array, g: Array, settings: Settings) -> None:
    mask = (u * g > 0).astype(np.float64)
    state.mask_mean = float(mask.mean()) if mask.size else 0.0
    decays = (u * state.p >= 0) if settings.cautious_weight_decay else np.ones_like(mask)
    decayed = state.p - settings.lr * settings.weight_decay * decays * state.p
    state.p = decayed - settings.lr * u * mask / max(state.mask_mean, 1e-3)


def adamw(state: State, grad: Array, settings: Settings) -> None:
    """Algorithm 1 of arXiv 2411.16085 with eps after the bias correction."""
    g = -grad if settings.maximize else grad
    beta1, beta2 = settings.betas
    state.step += 1
    state.m = beta1 * state.m + (1 - beta1) * g
    state.v = beta2 * state.v + (1 - beta2) * g**2
    m_hat = state.m / (1 - beta1**state.step)
    v_hat = state.v / (1 - beta2**state.step)
    _masked_step(state, m_hat / (np.sqrt(v_hat) + settings.eps), g, settings)


def lion(state: State, grad: Array, settings: Settings) -> None:
    """C-Lion of arXiv 2411.16085."""
    g = -grad if settings.maximize else grad
    beta1, beta2 = settings.betas
    state.step += 1
    _masked_step(state, np.sign(beta1 * state.m + (1 - beta1) * g), g, settings)
    state.m = beta2 * state.m + (1 - beta2) * g


def sgd(
    state: State, grad: Array, settings: Settings, momentum: float, nesterov: bool = False
) -> None:
    """SGD with heavy-ball or Nesterov momentum (arXiv 2411.16085, the general form), decay decoupled."""
    g = -grad if settings.maximize else grad
    state.step += 1
    state.m = momentum * state.m + g
    _masked_step(state, g + momentum * state.m if nesterov else state.m, g, settings)
