"""`effx convert`: a checkpoint in the format of something else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from effx_dist.cli.places import Folder, folder_and_step, read_json
from effx_dist.cli.ranks import Mpi, Torchrun, tool_ranks
from effx_dist.cli.show import progress
from effx_dist.errors import ConfigError

Target = Literal["dcp", "torch", "safetensors", "universal"]


def convert(
    folder: Folder,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="What to write; must not exist, or be empty.")
    ],
    target: Annotated[Target, typer.Option("--to", help="Format of OUT; see above.")],
    step: Annotated[int | None, typer.Option(min=0, help="Step; else the newest.")] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="dcp, torch: leave out the optimizer.")
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(help="safetensors: split larger models, as transformers does.")
    ] = "5GB",
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='safetensors: the model\'s config.json; else extra["config"] of the checkpoint.',
        ),
    ] = None,
    mpi: Mpi = 0,
    torchrun: Torchrun = False,
) -> None:
    """Write one checkpoint as something that others load.

    dcp: a plain folder of torch.distributed.checkpoint: dcp.load of {"model":
    get_model_state_dict(...), "optim": get_optimizer_state_dict(...)}, at any number of ranks.

    torch: one file for torch.load(weights_only=True): "model" and "optimizer" for load_state_dict,
    "step", "extra", "stateful". Takes memory for all of it.

    safetensors: the weights in shards and config.json, for from_pretrained of transformers. A GPT
    model of Megatron becomes a Llama where it is one; config.json then holds what the checkpoint
    says of the model, and over it what --config says.

    universal: a DeepSpeed universal checkpoint, for engine.load_checkpoint with {"checkpoint":
    {"load_universal": true}} and load_lr_scheduler_states=False; parameters and optimizer state,
    no buffers. Tried with DeepSpeed 0.19.8, ZeRO 1 to 3, on the CPU.

    OUT appears whole in the end, or not at all. Ranks share the parameters (universal), the shards
    (safetensors: choose --max-shard-size so that each has some) or the tensors (dcp); a torch file
    is the first rank's alone.
    """
    if not (mpi or torchrun):  # a misspelt path should not wait for torch
        folder_and_step(folder, step)
    with tool_ranks(mpi, torchrun) as ranks:
        from effx_dist.checkpoint.tools.convert import ConvertOptions, convert_checkpoint

        place, step = ranks.everywhere(lambda: folder_and_step(folder, step), keep_own_error=False)
        given = ranks.everywhere(
            lambda: None if config is None else _read_config(config), keep_own_error=False
        )
        options = ConvertOptions(
            weights_only=weights_only, max_shard_size=max_shard_size, config=given
        )
        write = partial(convert_checkpoint, place, target, output, step=step)
        with progress("converting", ranks.rank == 0) as advance:
            done = write(options=options, group=ranks, on_progress=advance)
    if ranks.rank == 0:
        typer.echo(f"step {done} as {target}: {output}")


def _read_config(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must hold one JSON object, as the config.json of a model does")
    return found
