"""What is installed here and what of effx_dist will therefore work. Nothing missing or broken makes it fail.

Engines are looked up, never imported: importing DeepSpeed may compile, and a broken engine would take this down.
No communication is performed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import time
import warnings
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from effx_dist.report.text import bytes_text, plural
from effx_dist.version import __version__

REQUIRED = (
    *("torch", "numpy", "numcodecs", "zstandard", "xxhash", "pydantic"),
    *("fsspec", "safetensors", "typer", "rich", "pyyaml"),
)
OPTIONAL = {
    "deepspeed": "engine",
    "megatron-core": "engine",
    "mpi4py": "mpirun",
    "transformers": "Llama from Hugging Face",
    "tensorboard": "scalars beside run.jsonl",
}


@dataclass(frozen=True)
class Entry:
    """One thing looked at: a package, a device, or a feature."""

    name: str
    found: str
    """A version or a description; "no" where it is absent."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What `effx doctor` shows."""

    machine: tuple[Entry, ...]
    packages: tuple[Entry, ...]
    features: tuple[Entry, ...]
    missing: tuple[str, ...]
    """Required packages that are absent or do not import; empty where effx_dist can be used."""


def examine() -> Examination:
    """Look at the interpreter, the packages, the devices and torch's backends."""
    versions = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    torch, fault = _import_torch()
    missing = [name for name in REQUIRED if versions[name] is None]
    if fault and "torch" not in missing:
        missing.append("torch")
    return Examination(
        machine=(
            Entry("effx_dist", __version__),
            Entry("python", platform.python_version(), platform.platform()),
            Entry("processor cores", str(_num_cores())),
            *_accelerators(torch),
            Entry("communication", _backends(torch) or "no", "backends of torch.distributed"),
        ),
        packages=tuple(_package(name, versions[name], fault) for name in versions),
        features=tuple(_features(versions, torch)),
        missing=tuple(missing),
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _import_torch() -> tuple[Any, str]:
    """Return (torch, "") or (None, why not): a build for other drivers fails on import with an OSError."""
    try:
        return importlib.import_module("torch"), ""
    except Exception as error:  # whatever a broken build raises is a finding here
        return None, f"{type(error).__name__}: {error}"


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # a container may have narrowed what this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _package(name: str, version: str | None, torch_fault: str) -> Entry:
    if name == "torch" and version and torch_fault:
        return Entry(name, version, f"does not import: {torch_fault}")
    if version:
        return Entry(name, version, OPTIONAL.get(name, ""))
    return Entry(name, "no", OPTIONAL.get(name) or f"required; pip install {name}")


def _accelerators(torch: Any) -> list[Entry]:
    """List every device; a driver that is there but refuses is a line, not a crash."""
    try:
        if torch is None or not torch.cuda.is_available():
            return [Entry("accelerators", "no", "training runs on the processor")]
        found = [
            torch.cuda.get_device_properties(place) for place in range(torch.cuda.device_count())
        ]
    except Exception as error:
        return [Entry("accelerators", "no", f"{type(error).__name__}: {error}")]
    return [
        Entry(f"cuda:{i}", device.name, bytes_text(device.total_memory))
        for i, device in enumerate(found)
    ]


def _backends(torch: Any) -> str:
    if torch is None or not torch.distributed.is_available():
        return ""
    names = ("gloo", "nccl", "mpi", "ucc", "xccl")
    checks = {name: getattr(torch.distributed, f"is_{name}_available", None) for name in names}
    return ", ".join(name for name, check in checks.items() if check is not None and check())


def _features(versions: dict[str, str | None], torch: Any) -> list[Entry]:
    backends = _backends(torch)
    no_torch = "" if torch is not None else "torch does not import"
    codecs = [name for name in ("numcodecs", "zstandard", "xxhash") if not versions[name]]
    no_codecs = f"pip install {' '.join(codecs)}" if codecs else ""
    no_ranks = "" if backends else "torch.distributed has no backend"
    return [
        _feature("sample pruning (InfoBatch)", no_torch),
        _feature("cautious optimisers", no_torch, _cautious_step(torch)),
        _feature("compressed checkpoints (ExCP)", no_torch or no_codecs),
        _feature(
            "several ranks", no_torch or no_ranks, plural(len(backends.split(", ")), "backend")
        ),
        _feature("FSDP2", no_torch or no_ranks or _adapter_fault("fsdp2")),
        _feature(
            "DeepSpeed",
            _engine_fault("deepspeed", versions["deepspeed"]) or _blocked_by_lock(torch),
        ),
        _feature("Megatron-core", _engine_fault("megatron", versions["megatron-core"])),
        _feature(
            "TensorBoard scalars", "" if versions["tensorboard"] else "pip install tensorboard"
        ),
    ]


def _cautious_step(torch: Any) -> str:
    """Which implementation of the step serves this machine; builds the compiled one if need be."""
    if torch is None:
        return ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            from effx_dist.optim.kernels import kernels_class

            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            name = kernels_class("auto", device).__name__
        except Exception as error:  # a package that it needs is missing or broken
            return f"{type(error).__name__}: {error}"
    if caught:
        return str(caught[0].message)
    return f"{device.type}: {name.removesuffix('Kernels').lower()}"


def _blocked_by_lock(torch: Any) -> str:
    """Names a lock that a killed build of one of DeepSpeed's operators has left: DeepSpeed would wait for it
    without end. A lock of the last minute may be that of a build under way."""
    if torch is None:
        return ""
    try:
        from effx_dist.engines.build_locks import IDLE_S, is_stale, locks

        for lock in locks():
            if time.time() - lock.stat().st_mtime > IDLE_S and is_stale(lock):
                return f"{lock} blocks its start: remove it, or let effx_dist.deepspeed do so"
    except Exception as error:  # nothing to find is no reason to fail
        return f"{type(error).__name__}: {error}"
    return ""


def _feature(name: str, obstacle: str, note: str = "") -> Entry:
    return Entry(name, "no", obstacle) if obstacle else Entry(name, "yes", note)


def _engine_fault(adapter: str, engine_version: str | None) -> str:
    return _adapter_fault(adapter) or (
        "" if engine_version else f"pip install 'effx-dist[{adapter}]'"
    )


def _adapter_fault(adapter: str) -> str:
    try:
        found = importlib.util.find_spec(f"effx_dist.engines.{adapter}")
    except ModuleNotFoundError:  # no package of engines at all
        found = None
    return "" if found else f"effx_dist {__version__} has no adapter for it"
