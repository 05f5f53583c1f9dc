"""Megatron-core on a CPU over gloo, for tests alone: it knows no device but CUDA.

Import it before anything of megatron. It changes torch for the whole process, so only processes
that are started for such tests import it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn")
_LIKES = ("empty_like", "zeros_like", "ones_like")
_TYPES = ("Float", "Int", "Long", "Byte", "Half", "BFloat16", "Double")


class _Stream:
    """A stream or an event: nothing runs beside anything."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


def _nothing() -> Callable[..., None]:
    """A new function each time: torch's compiler wants one object under one name."""
    return lambda *_, **__: None


def _stand_in_for_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.Stream = cuda.Event = _Stream
    for name in ("current_stream", "default_stream", "stream"):
        setattr(cuda, name, lambda *_, **__: _Stream())
    for name in (
        "synchronize",
        "set_device",
        "manual_seed_all",
    ):  # torch.manual_seed calls the last
        setattr(cuda, name, _nothing())
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    for name in _TYPES:
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))


def _let_tensors_pass_for_cudas() -> None:
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    for name in (*_FACTORIES, *_LIKES):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    own_type = tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Megatron compares the names of types."""
        found = own_type(self, *args, **kwargs)
        is_name = not args and not kwargs and isinstance(found, str)
        return found.replace("torch.", "torch.cuda.", 1) if is_name else found

    tensor.type = type_


def _mend_megatron() -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):  # left unset without Transformer Engine
        moe_utils.te_general_gemm = None
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()


_stand_in_for_cuda()
_let_tensors_pass_for_cudas()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what is not installed beside it
    _mend_megatron()
