"""The optimiser's state of a parameter: its moments and the number of its steps."""

from __future__ import annotations

from typing import Any

import torch

from effx_dist.core.update_rules import UpdateRule
from effx_dist.optim.kernels import working_dtype

HALF_DTYPES = (torch.float16, torch.bfloat16)


def start_state(
    state: dict[str, Any], rule: UpdateRule, param: torch.Tensor, capturable: bool
) -> None:
    """Make the state of ``param`` on its first step: zeros, sharded as it is."""
    if rule.counts_steps and "step" not in state:
        # On the host unless asked otherwise: reading it must not wait for the device.
        device = param.device if capturable else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    for name in rule.moment_names:
        if state.get(name) is None:  # torch.optim.SGD keeps None without momentum
            state[name] = torch.zeros_like(param, dtype=working_dtype(param))


def mend_loaded_state(
    state: dict[str, Any],
    saved: dict[str, Any],
    rule: UpdateRule,
    param: torch.Tensor,
    capturable: bool,
) -> None:
    """After torch has loaded ``saved`` into ``state``: moments unrounded, steps where they belong.

    torch rounds each moment to its parameter's dtype and leaves the steps of a fused or capturable
    optimiser on the device.
    """
    if param.dtype in HALF_DTYPES:
        for name in rule.moment_names:
            if isinstance(saved.get(name), torch.Tensor):
                state[name] = saved[name].to(device=param.device, dtype=torch.float32)
    if rule.counts_steps and "step" in state:
        device = param.device if capturable else torch.device("cpu")
        step = torch.as_tensor(state["step"], dtype=torch.float32)
        state["step"] = step.detach().clone().to(device)
