"""A DeepSpeed universal checkpoint, as ``engine.load_checkpoint`` reads it with
``{"checkpoint": {"load_universal": true}}``.

DeepSpeed restores parameters and optimizer state from it at any number of ranks and ZeRO stage 1 to
3. It does not restore buffers, nor the learning rate schedule of another library: load with
``load_lr_scheduler_states=False`` what no DeepSpeed engine has saved. ZeRO-3 takes the options of the
first parameter group for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from effx_dist.checkpoint.tools.convert.content import Content
from effx_dist.checkpoint.tools.sharing import dealt_out
from effx_dist.errors import ConfigError
from effx_dist.shard import Group

LATEST_UNIVERSAL = "latest_universal"
DS_VERSION = "0.19.8"
"""The DeepSpeed whose loader this was written for; its loader asks for one and refuses very old ones."""
STEP = "step"
ENGINE = "deepspeed"
"""Where the checkpoint of a DeepSpeed engine keeps its counters, in ``extra``."""


def write_universal(content: Content, folder: Path, group: Group) -> None:
    """``latest_universal`` and ``global_stepN/`` with a folder per parameter: fp32.pt, one file per
    state tensor of the parameter's shape (exp_avg.pt, ...), step.pt.

    The ranks share the parameters; one tensor is in memory at a time. No communication is performed.
    Raises ConfigError where there is no optimizer state, CorruptCheckpointError, OSError.
    """
    if not content.optimizer or content.values.param_groups is None:
        raise ConfigError(
            f"{content.chain.top.folder}: holds no optimizer state, which a universal checkpoint needs; "
            "convert to torch, dcp or safetensors"
        )
    tag = f"global_step{content.manifest.step}"
    zero = folder / tag / "zero"
    parameters = {
        name: stored
        for name, stored in content.untied.items()
        if content.record(stored).torch_dtype.is_floating_point
    }
    files = {
        name: {"fp32": stored} | _same_shape(content, name) for name, stored in parameters.items()
    }
    sizes = [sum(map(content.num_bytes, found.values())) for found in files.values()]
    names = list(parameters)
    mine = [names[index] for index in dealt_out(sizes, group.size)[group.rank]]
    content.will_read(stored for name in mine for stored in files[name].values())
    for name in mine:
        own = zero / name
        own.mkdir(parents=True)
        for key, stored in files[name].items():
            values = content.read(stored).float()
            torch.save({"param": values, "cat_dim": 0}, own / f"{key}.pt")
        step = _step_of(content, name)
        if step is not None:
            torch.save(step, own / f"{STEP}.pt")
    if group.rank == 0:
        _save_options(content, names, zero)
        _save_engine_state(content, folder / tag)
        (folder / LATEST_UNIVERSAL).write_text(tag, encoding="ascii")


def _same_shape(content: Content, name: str) -> dict[str, str]:
    shape = content.record(content.model[name]).shape
    entries = content.optimizer.get(name, {})
    return {
        key: stored
        for key, stored in entries.items()
        if key != STEP and content.record(stored).shape == shape
    }


def _step_of(content: Content, name: str) -> Any:
    stored = content.optimizer.get(name, {}).get(STEP)
    if stored is not None:
        return content.read(stored)
    return content.optimizer_values(name).get(STEP)


def _save_options(content: Content, names: Iterable[str], zero: Path) -> None:
    """The optimizer's options, and the step of the first parameter that has one."""
    zero.mkdir(parents=True, exist_ok=True)
    steps = (_step_of(content, name) for name in names)
    step = next((found for found in steps if found is not None), None)
    options = content.tree(content.values.param_groups, "param_groups")
    groups = [{**group, "params": []} for group in options]
    torch.save(
        {
            "ds_version": DS_VERSION,
            "param_groups": groups,
            # ZeRO-3 looks for the same one level down
            "optimizer_state_dict": {"state": {0: {STEP: step}}, "param_groups": groups},
        },
        zero / "optimizer_state.pt",
    )


def _save_engine_state(content: Content, folder: Path) -> None:
    """What the engine keeps beside the tensors, under the names of ZeRO-1/2 and of ZeRO-3."""
    extra = content.tree(content.values.extra, "extra")
    counters = extra.pop(ENGINE, {})
    # a DeepSpeed engine's extra is its client_state, which lies beside its own entries
    engine_state = (extra if counters else {"extra": extra}) | {
        "module": {},
        "optimizer": None,
        "lr_scheduler": content.tree(content.values.stateful.get("lr_scheduler"), "lr_scheduler"),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": content.manifest.step,
        "skipped_steps": counters.get("skipped_steps", 0),
        "ds_version": DS_VERSION,
    }
    if "global_samples" in counters:  # else DeepSpeed counts them from the steps
        engine_state["global_samples"] = counters["global_samples"]
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save(engine_state, folder / name)
