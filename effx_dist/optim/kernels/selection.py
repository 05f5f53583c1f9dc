"""Which implementation of the step serves a device."""

from __future__ import annotations

import functools
import warnings
from typing import Literal, get_args

import torch

from effx_dist.errors import ConfigError
from effx_dist.optim.kernels import compiled
from effx_dist.optim.kernels.eager import EagerKernels
from effx_dist.optim.kernels.interface import Kernels

Implementation = Literal["auto", "triton", "compiled", "eager"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)


def kernels_class(implementation: Implementation, device: torch.device) -> type[Kernels]:
    """The walks for tensors on ``device``.

    "auto" is "triton" on CUDA and ROCm devices, "compiled" on the CPU and "eager" elsewhere. Where
    Triton or a C++ compiler is missing it is "eager", with one warning.

    Raises:
        ConfigError: the implementation is not for this kind of device.
    """
    if implementation == "eager":
        return EagerKernels
    kind: str = implementation
    if kind == "auto":
        kind = {"cuda": "triton", "cpu": "compiled"}.get(device.type, "eager")
    if kind == "compiled":
        if device.type != "cpu":
            raise _misplaced(implementation, device, "the CPU")
        return compiled.CompiledKernels if compiled.is_available() else EagerKernels
    if kind == "triton":
        return _triton_kernels(implementation, device)
    return EagerKernels


def _triton_kernels(implementation: Implementation, device: torch.device) -> type[Kernels]:
    if not _has_triton():
        return EagerKernels
    from effx_dist.optim.kernels import triton_launch as triton_launch

    if not triton_launch.runs_on(device):  # on a GPU: kernels run in Triton's interpreter
        if implementation == "auto":
            return EagerKernels
        raise _misplaced(implementation, device, "CUDA and ROCm devices")
    return triton_launch.TritonKernels


@functools.cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        warnings.warn(
            f"Triton cannot be imported ({error}); the eager cautious step is used: the same values, "
            "but slower. Install the triton package that belongs to your torch.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _misplaced(implementation: str, device: torch.device, place: str) -> ConfigError:
    return ConfigError(
        f"{implementation=} is for {place}, but a parameter is on {device}; "
        "choose implementation='auto'"
    )
