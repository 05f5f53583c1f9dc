"""`effx compress`: plain checkpoints that are there already, as a compressed chain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effx_dist.cli.places import read_json
from effx_dist.cli.ranks import Mpi, Torchrun, tool_ranks
from effx_dist.cli.show import progress, show_line, show_table
from effx_dist.config import ExcpConfig, ProfileName
from effx_dist.errors import CheckpointNotFoundError, ConfigError
from effx_dist.report.text import bytes_text, number_text, plural, ratio_text

if TYPE_CHECKING:
    from effx_dist.checkpoint.tools.compress import CompressReport


Series = Annotated[
    list[Path],
    typer.Argument(metavar="SERIES", help="Folders of checkpoints, or checkpoints. Never changed."),
]
Output = Annotated[
    str, typer.Argument(metavar="OUT", help="Folder or URL of the chain, new or to go on with.")
]
HowLossy = Annotated[
    ProfileName, typer.Option(help="What is traded for size; lossless is bit-exact.")
]
BaseEvery = Annotated[
    int, typer.Option(min=1, help="Checkpoints from one that is stored whole to the next.")
]
BaseEverySize = Annotated[
    float | None,
    typer.Option(help="Also one as soon as those since the last take up so many times its bytes."),
]
MaxError = Annotated[
    float | None,
    typer.Option(help="Store a tensor losslessly if its relative error would be greater."),
]
WeightsOnly = Annotated[bool, typer.Option("--weights-only", help="Leave the optimizer out.")]
ParamNames = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="JSON: one list of parameter names for each of the optimizer's groups, where the "
        "checkpoints number them and the model's order does not tell.",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Unpickle torch and DeepSpeed files that hold more than tensors and plain values. "
        "That runs whatever code the files name.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="Cores to encode on; by default all, and one where ranks share the work."
    ),
]
_DEFAULTS = ExcpConfig()


def compress(
    series: Series,
    output: Output,
    profile: HowLossy = _DEFAULTS.profile,
    base_every: BaseEvery = _DEFAULTS.base_every,
    base_every_size: BaseEverySize = None,
    max_error: MaxError = None,
    weights_only: WeightsOnly = False,
    param_names: ParamNames = None,
    trust: Trust = False,
    threads: Threads = None,
    mpi: Mpi = 0,
    torchrun: Torchrun = False,
) -> None:
    """Compress a series of plain checkpoints: folders of torch.distributed.checkpoint, torch files,
    DeepSpeed folders.

    What wrote a checkpoint is told by its files, its step is the last number in its name. OUT then
    holds what a Checkpointer would have written, to inspect, verify, convert and load. Each step is
    committed by itself: run the command again after it was cut off, or when there are new
    checkpoints, and it goes on with the first that OUT lacks.

    Ranks share the work by tensors: mpirun -n 8 effx compress SERIES OUT.
    """
    if not (mpi or torchrun):  # a misspelt path should not wait for torch
        _check_there(series)
    with tool_ranks(mpi, torchrun) as ranks:
        from effx_dist.checkpoint.tools.compress import ReadOptions, compress_series

        def config_of() -> ExcpConfig:
            return ExcpConfig(
                profile=profile,
                base_every=base_every,
                base_every_size=base_every_size,
                max_error=max_error,
                encoder_threads=threads or ((os.cpu_count() or 1) if ranks.size == 1 else 1),
            )

        config = ranks.everywhere(config_of, keep_own_error=False)
        names = ranks.everywhere(
            lambda: None if param_names is None else _read_names(param_names), keep_own_error=False
        )
        options = ReadOptions(weights_only=weights_only, param_names=names, trust=trust)
        is_first = ranks.rank == 0
        with progress("compressing", is_first) as on_progress:
            done = compress_series(
                series, output, config, options=options, group=ranks, on_progress=on_progress
            )
    if is_first:
        _show(done)


def _show(done: CompressReport) -> None:
    if done.num_there:
        show_line(f"{plural(done.num_there, 'step')} there already")
    if done.num_steps:
        sizes = [bytes_text(done.read_bytes), bytes_text(done.stored_bytes)]
        ratio = ratio_text(done.read_bytes / done.stored_bytes)
        row = [str(done.num_steps), *sizes, ratio, number_text(done.error, 3)]
        show_table(["steps", "bytes in", "bytes out", "ratio", "greatest error"], [row])


def _check_there(series: list[Path]) -> None:
    for path in series:
        if not path.exists():
            raise CheckpointNotFoundError(f"{path}: no such checkpoint, nor a folder of them")


def _read_names(path: Path) -> list[list[str]]:
    found = read_json(path)
    groups = found if isinstance(found, list) else []
    if not groups or not all(
        isinstance(group, list) and all(isinstance(name, str) for name in group) for group in groups
    ):
        raise ConfigError(
            f"{path}: must hold one list of parameter names for each group, in a list"
        )
    return groups
