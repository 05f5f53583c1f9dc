"""Start a launch script that stops within a step, for ever, so that it is surely alive to be killed there.

python tests/held_launch.py STEP SCRIPT ARGUMENTS...
"""

from __future__ import annotations

import runpy
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def hold_at(held: int) -> None:
    """Each rank waits once it has recorded the samples of the step ``held``; its threads go on."""
    from launch.llama.loop import SampleRecord

    write = SampleRecord.write

    def write_and_wait(
        self: SampleRecord, step: int, epoch: int, ids: Iterable[torch.Tensor]
    ) -> None:
        write(self, step, epoch, ids)
        if step == held:
            threading.Event().wait()

    SampleRecord.write = write_and_wait  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    # DeepSpeed's launcher puts --local_rank=N before the arguments it was given.
    from_launcher = [argument for argument in sys.argv[1:2] if argument.startswith("--")]
    held, script, *arguments = sys.argv[1 + len(from_launcher) :]
    hold_at(int(held))
    sys.argv = [script, *from_launcher, *arguments]
    runpy.run_path(script, run_name="__main__")
