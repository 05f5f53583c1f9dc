"""What a checkpoint holds, under the names of the model and of its optimizer; read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch

from effx_dist.checkpoint.format.manifest import TensorRecord
from effx_dist.checkpoint.format.reader import ChainReader
from effx_dist.checkpoint.format.whole_tensors import OnProgress, check_declared, read_whole
from effx_dist.checkpoint.state.matching import MODEL, OPTIMIZER
from effx_dist.checkpoint.state.training_state import RunValues, run_values
from effx_dist.checkpoint.state.tree import read_tree
from effx_dist.errors import ConfigError
from effx_dist.shard import Box


class Content:
    """One checkpoint of a Checkpointer. No communication is performed.

    Raises ConfigError where it holds no model, CorruptCheckpointError where it declares more than the
    bound of tools.
    """

    def __init__(self, chain: ChainReader, on_progress: OnProgress | None = None) -> None:
        check_declared(chain.top.declared_bytes, chain.top.folder)
        self.chain = chain
        self.manifest = chain.top.manifest
        self._on_progress = on_progress
        self._done_bytes = 0
        self.total_bytes = 0
        """What the conversion will read, for its progress; set by the writer of a target."""
        if not self.model:
            raise ConfigError(
                f"{chain.top.folder}: holds no tensor of a model ({MODEL}.*); only checkpoints that a "
                "Checkpointer wrote can be converted. Read others with "
                "torch.distributed.checkpoint and effx_dist.ExcpReader"
            )

    @cached_property
    def model(self) -> dict[str, str]:
        """``{name in the model's state_dict(): stored name}``, tied tensors under every name."""
        prefix = f"{MODEL}."
        in_model = {n for n in self.manifest.tensors if n.startswith(prefix)}
        aliases = {a: n for a, n in self.manifest.aliases.items() if a.startswith(prefix)}
        trees = {f"{prefix}{name}" for name in self.values.model_values}
        own = {n for n in in_model if not any(n == t or n.startswith(f"{t}.") for t in trees)}
        return {n.removeprefix(prefix): n for n in sorted(own)} | {
            alias.removeprefix(prefix): name for alias, name in sorted(aliases.items())
        }

    @cached_property
    def untied(self) -> dict[str, str]:
        """``model`` without the second names of tied tensors."""
        return {name: stored for name, stored in self.model.items() if f"{MODEL}.{name}" == stored}

    @cached_property
    def optimizer(self) -> dict[str, dict[str, str]]:
        """``{parameter: {key: stored name}}`` of the optimizer's state tensors."""
        found: dict[str, dict[str, str]] = {}
        prefix = f"{OPTIMIZER}."
        for stored in self.manifest.tensors:
            if stored.startswith(prefix):
                parameter, key = self._split(stored.removeprefix(prefix))
                if key not in self.values.optimizer_values.get(parameter, {}):
                    found.setdefault(parameter, {})[key] = stored
        return found

    def _split(self, path: str) -> tuple[str, str]:
        """Parameter and key of a state tensor's path; both may hold dots."""
        parts = path.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if (name := ".".join(parts[:end])) in self.model:
                return name, ".".join(parts[end:])
        return path.rpartition(".")[0], parts[-1]

    @cached_property
    def values(self) -> RunValues:
        """What is no tensor."""
        return run_values(self.manifest)

    @cached_property
    def leaves(self) -> Mapping[str, torch.Tensor]:
        """Stored tensors by name, each read when it is asked for."""
        return _Leaves(self)

    def tree(self, value: Any, what: str) -> Any:
        """A nested value with its tensors in it. Raises CorruptCheckpointError."""
        return read_tree(value, self.leaves, what)

    def optimizer_values(self, parameter: str) -> dict[str, Any]:
        """The optimizer's state of a parameter that is no tensor."""
        found = self.values.optimizer_values.get(parameter, {})
        return dict(self.tree(found, f"optimizer values of {parameter}"))

    def param_groups(self) -> list[dict[str, Any]]:
        """Options of each parameter group, and the names of its parameters under ``params``.

        Raises ConfigError where the checkpoint does not say which parameters these are.
        """
        options = self.tree(self.values.param_groups or [], "param_groups")
        by_group: list[list[str]] | None = getattr(self.values, "group_parameters", None)
        if by_group is None or len(by_group) != len(options):
            raise ConfigError(
                f"{self.chain.top.folder}: does not say which parameters its {len(options)} parameter "
                "group(s) hold, and in which order, as checkpoints from before effx-dist kept "
                "that do not; convert the weights alone (--weights-only)"
            )
        return [
            {**group, "params": list(names)} for group, names in zip(options, by_group, strict=True)
        ]

    def record(self, stored: str) -> TensorRecord:
        """The manifest's record of a stored tensor."""
        return self.manifest.tensors[stored]

    def read(self, stored: str) -> torch.Tensor:
        """All values of a stored tensor. Raises CorruptCheckpointError."""
        values = read_whole(self.chain, stored)
        self._advance(values)
        return values

    def read_box(self, stored: str, box: Box) -> torch.Tensor:
        """The values of one box of it. Raises CorruptCheckpointError."""
        values = self.chain.read(stored, box)
        self._advance(values)
        return values

    def num_bytes(self, stored: str) -> int:
        """Bytes of a stored tensor when it is decoded."""
        return self.manifest.tensors[stored].raw_bytes

    def will_read(self, names: Iterator[str]) -> None:
        """Say beforehand what a conversion reads."""
        self.total_bytes = sum(self.num_bytes(name) for name in names)

    def _advance(self, values: torch.Tensor) -> None:
        self._done_bytes += values.nbytes
        if self._on_progress is not None:
            self._on_progress(self._done_bytes, max(self.total_bytes, self._done_bytes))


class _Leaves(Mapping[str, torch.Tensor]):
    def __init__(self, content: Content) -> None:
        self._content = content

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._content.manifest.tensors:
            raise KeyError(name)
        return self._content.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._content.manifest.tensors)

    def __len__(self) -> int:
        return len(self._content.manifest.tensors)
