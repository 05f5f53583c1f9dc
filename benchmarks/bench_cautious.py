"""What a cautious step costs beside AdamW: time, bytes, bandwidth, and on several ranks.

    python benchmarks/bench_cautious.py                     # every workload that fits, then 2 and 4 ranks
    python benchmarks/bench_cautious.py --device cuda --dtype bfloat16
    python benchmarks/bench_cautious.py --workloads one-16.8m,llama-60m --ranks "" --rounds 50

Prints one JSON object, and a table to stderr. All contenders of a workload work on the same
tensors and take turns, in a new order each round, so that drift hits all alike; those that take far
longer take part in every fourth round. `ratio` is the median over rounds of the time over that of
torch's fused AdamW in the same round, `ratio_of_mins` that of the shortest times; a machine that
does something else beside shows in the difference. `bytes_per_param` is what the design has to move,
reads and writes, `gb_per_s` that over the median time, and `of_copy` its share of what a copy
reached (a copy writes where it has not read, for which a CPU reads in secret: the share may exceed
1). On a GPU a time is the mean of several steps between two events; on several ranks it is that of
the slowest. Gradients stay as they are. The first steps of each contender are not timed.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cautious_contenders import COPY, FUSED, Contender, all_contenders
from benchmarks.cautious_ranks import MODEL, measure_ranks
from benchmarks.cautious_workloads import DEFAULT, SHAPES, Tensors, shortage

DTYPES = ("float32", "bfloat16", "float16")
SLOW, SLOW_EVERY = 5, 4
"""Who takes this many times as long as the fused AdamW takes part in every fourth round only."""
STEPS_PER_EVENT_PAIR = 10
Record = dict[str, Any]


def main(
    device: Annotated[
        str, typer.Option(help='"cpu", "cuda", or "auto": cuda if there is one.')
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help=f"Of parameters and gradients: {', '.join(DTYPES)}.")
    ] = "float32",
    workloads: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(SHAPES)}.")] = "",
    ranks: Annotated[str, typer.Option(help='Numbers of ranks; "" for none.')] = "2,4",
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each contender.")] = 15,
    build_deepspeed: Annotated[bool, typer.Option(help="Build DeepSpeed's op if need be.")] = False,
) -> None:
    """Measure, print JSON to stdout and a table to stderr."""
    place = _device(device)
    names = _checked_names(workloads or DEFAULT[place.type])
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r}: must be one of {', '.join(DTYPES)}")
    load_before = os.getloadavg()
    records = []
    for name in names:
        record = _measure_workload(name, getattr(torch, dtype), place, rounds, build_deepspeed)
        records.append(record)
        _print_table(record)
    on_ranks = []
    for world in [int(number) for number in ranks.split(",") if number.strip()]:
        record = _measure_world(world, place, dtype, rounds)
        on_ranks.append(record)
        _print_table(record)
    result = {
        "settings": {"device": place.type, "dtype": dtype, "rounds": rounds},
        "hardware": _hardware(place) | {"load_before": load_before, "load_after": os.getloadavg()},
        "versions": _versions(),
        "workloads": records,
        "ranks": on_ranks,
    }
    typer.echo(json.dumps(result, indent=1))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in DEFAULT:
        raise typer.BadParameter(f"{name!r}: must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device")
    return (
        torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)
    )


def _checked_names(listed: str) -> list[str]:
    names = [name.strip() for name in listed.split(",")]
    for name in names:
        if name not in SHAPES:
            raise typer.BadParameter(f"{name!r}: must be one of {', '.join(SHAPES)}")
    return names


def _measure_workload(
    name: str, dtype: torch.dtype, device: torch.device, rounds: int, build_deepspeed: bool
) -> Record:
    shapes = SHAPES[name]()
    record: Record = {
        "workload": name,
        "tensors": len(shapes),
        "params": sum(map(math.prod, shapes)),
    }
    if (reason := shortage(shapes, device)) is not None:
        return record | {"skipped": reason}
    tensors = Tensors.make(shapes, dtype, device)
    contenders, missing = all_contenders(tensors, device, build_deepspeed=build_deepspeed)
    samples = _take_turns(contenders, device, rounds)
    copy = next(contender for contender in contenders if contender.name == COPY)
    assert copy.bytes_moved is not None, "a copy reads and writes"
    copy_rate = copy.bytes_moved / statistics.median(samples[COPY].values())
    rows = []
    for contender in contenders:
        row = _times(contender.name, samples)
        if contender is copy:
            row["bytes"] = copy.bytes_moved
            row |= {"gb_per_s": round(copy_rate / 1e6, 2), "of_copy": 1.0}
        elif contender.bytes_moved is not None:
            rate = contender.bytes_moved / row["median_ms"]
            row["bytes_per_param"] = round(contender.bytes_moved / tensors.numel, 2)
            row |= {"gb_per_s": round(rate / 1e6, 2), "of_copy": round(rate / copy_rate, 3)}
        if contender.walks is not None:
            row["walks"] = contender.walks
        rows.append(row)
    return record | {"rows": rows + missing}


def _take_turns(
    contenders: list[Contender], device: torch.device, rounds: int
) -> dict[str, dict[int, float]]:
    """Milliseconds of each contender by round."""
    samples: dict[str, dict[int, float]] = {contender.name: {} for contender in contenders}
    first = {contender.name: _one_sample_ms(contender, device) for contender in contenders}
    slow = {name for name, spent_ms in first.items() if spent_ms > SLOW * first[FUSED]}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    for number in range(rounds):
        shuffle(order)  # nobody always follows the one that empties the caches
        for contender in order:
            if contender.name not in slow or number % SLOW_EVERY == 0:
                samples[contender.name][number] = _one_sample_ms(contender, device)
    return samples


def _one_sample_ms(contender: Contender, device: torch.device) -> float:
    if device.type == "cpu":
        started = time.perf_counter()
        contender.run()
        return (time.perf_counter() - started) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(STEPS_PER_EVENT_PAIR):
        contender.run()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / STEPS_PER_EVENT_PAIR


def _times(name: str, samples: dict[str, dict[int, float]]) -> Record:
    ours, fused = samples[name], samples[FUSED]
    return {
        "name": name,
        "samples": len(ours),
        "median_ms": round(statistics.median(ours.values()), 4),
        "min_ms": round(min(ours.values()), 4),
        "ratio": round(statistics.median(ours[number] / fused[number] for number in ours), 3),
        "ratio_of_mins": round(min(ours.values()) / min(fused.values()), 3),
    }


def _measure_world(world: int, device: torch.device, dtype: str, rounds: int) -> Record:
    record: Record = {"workload": f"{MODEL}, FSDP2, {world} ranks", "ranks": world}
    found = measure_ranks(world, device.type, dtype, rounds)
    if isinstance(found, str):
        return record | {"skipped": found}
    samples = {row["name"]: dict(enumerate(row.pop("samples_ms"))) for row in found}
    return record | {"rows": [_times(row["name"], samples) | row for row in found]}


def _hardware(device: torch.device) -> Record:
    found: Record = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    found["simd"] = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "timm", "deepspeed", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _print_table(record: Record) -> None:
    size = (
        f", {record['tensors']} tensors, {record['params']:,} parameters"
        if "params" in record
        else ""
    )
    lines = [f"\n{record['workload']}{size}"]
    if "skipped" in record:
        lines.append(f"  skipped: {record['skipped']}")
    for row in record.get("rows", []):
        if "skipped" in row:
            lines.append(f"  {row['name']:<44} {row['skipped']}")
            continue
        line = f"  {row['name']:<44} {row['median_ms']:10.3f} ms  min {row['min_ms']:10.3f}  {row['ratio']:7.2f}x"
        if "bytes_per_param" in row:
            line += f"  {row['bytes_per_param']:5.1f} B"
        if "gb_per_s" in row:
            line += f"  {row['gb_per_s']:8.1f} GB/s  {row['of_copy']:6.1%} of copy"
        if "collectives" in row:
            line += (
                f"  {row['collectives']} collectives, {row['all_reduce_bytes']} bytes all-reduced"
            )
        lines.append(line)
    typer.echo("\n".join(lines), err=True)


if __name__ == "__main__":
    typer.run(main)
