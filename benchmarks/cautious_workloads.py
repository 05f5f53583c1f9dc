"""Lists of parameters for bench_cautious.py, and the tensors that all its contenders work on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from launch.llama.model import llama_config
from launch.llama.settings import RunSettings

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
COPY_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 28}
"""Longest copy to measure, in float32 elements: beyond any cache."""


def meta_llama(name: str) -> LlamaForCausalLM:
    """The model of ``configs/<name>_fsdp2.toml`` without values: all tensors on the meta device."""
    settings = RunSettings.from_file(CONFIGS / f"{name}_fsdp2.toml")
    with torch.device("meta"):
        return LlamaForCausalLM(llama_config(settings.model, settings.data.seq_len))


def _llama_shapes(name: str) -> list[tuple[int, ...]]:
    return [tuple(param.shape) for param in meta_llama(name).parameters()]


SHAPES: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "one-16.8m": lambda: [(1 << 24,)],
    "one-268m": lambda: [(1 << 28,)],
    "llama-60m": lambda: _llama_shapes("llama_60m"),
    "llama-1b": lambda: _llama_shapes("llama_1b"),
    "small": lambda: [(1024,)] * 1000,
}
"""Shapes of each workload's parameters."""

DEFAULT = {
    "cpu": "one-16.8m,llama-60m,llama-1b,small",
    "cuda": "one-16.8m,one-268m,llama-60m,llama-1b,small",
}


def shortage(shapes: list[tuple[int, ...]], device: torch.device) -> str | None:
    """Why this workload does not fit into the device's memory; None if it does."""
    # Parameters, gradients and moments, and about as much again for the temporary lists of the
    # contenders that work on whole lists.
    needed = 32 * sum(map(math.prod, shapes))
    available = _available_bytes(device)
    if needed <= available:
        return None
    return f"needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are available"


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable: this benchmark needs Linux")


@dataclass
class Tensors:
    """Parameters with gradients, and moments that all contenders share.

    So each works on the same memory and the same values: where the allocator puts a tensor changes
    a time by more than the contenders differ.
    """

    params: list[torch.nn.Parameter]
    _moments: dict[tuple[int, int, torch.dtype], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def make(
        cls, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> Tensors:
        generator = torch.Generator(device).manual_seed(0)
        params = []
        for shape in shapes:
            param = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            param.grad = torch.empty_like(param).normal_(generator=generator)
            torch.nn.init.normal_(param, generator=generator)
            params.append(param)
        return cls(params)

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.params)

    def share_moments(self, optimizer: torch.optim.Optimizer) -> list[int]:
        """Let ``optimizer``, which has stepped, keep its moments here; the bytes of an element of
        each, in the order of the state.
        """
        sizes: list[int] = []
        for index, param in enumerate(self.params):
            state = optimizer.state[param]
            names = [name for name, value in state.items() if _is_moment(value, param)]
            for place, name in enumerate(names):
                key = (index, place, state[name].dtype)
                state[name] = self._moments.setdefault(key, state[name])
            sizes = [state[name].itemsize for name in names]
        return sizes


def _is_moment(value: object, param: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == param.shape
