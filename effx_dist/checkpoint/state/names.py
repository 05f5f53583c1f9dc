"""Names of a model's tensors in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.checkpoint.state_dict import _get_fqns

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""What only a wrapper calls its child. DDP's ``module`` is not among them: users call theirs so too."""


def plain_name(raw: str) -> str:
    """A parameter's name, as a file holds it or below the module that an engine wraps, without the
    names by which wrappers that may lie in between call their child."""
    return ".".join(part for part in raw.split(".") if part not in _WRAPPERS)


def torch_name(model: nn.Module, raw: str) -> str:
    """A live parameter's name as torch's ``get_model_state_dict`` gives it: without the wrappers that
    are there, and with every child of that name that is not one's."""
    found = _get_fqns(model, raw)  # several only for flat parameters, which stand for several
    return next(iter(found)) if len(found) == 1 else plain_name(raw)


def tied_names(
    model: nn.Module, name_of: Callable[[nn.Module, str], str] = torch_name
) -> dict[str, str]:
    """``{other name: first name}`` of parameters that a model holds under several names.

    ``name_of``: from the model and a name of ``named_parameters`` to that of the checkpoint.
    """
    first: dict[int, str] = {}
    tied = {}
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        name = name_of(model, raw)
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied
