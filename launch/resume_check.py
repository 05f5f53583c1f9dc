"""Proof from the recorded sample ids that a resumed run neither repeated nor skipped a sample."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step over all ranks, sorted."""

    epoch: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class ResumeCheck:
    """What the records of both halves say about the interrupted epoch."""

    restored_step: int
    epoch: int
    num_before: int
    """Samples of the epoch that the first half consumed up to the restored step."""
    num_after: int
    """Samples of the epoch that the second half consumed."""
    num_planned: int
    num_repeated: int
    num_skipped: int
    num_redone_steps: int
    """Steps that both halves ran: the first had gone beyond its last checkpoint."""
    num_differing_steps: int
    """Of those, the ones whose global batches differ."""

    @property
    def is_good(self) -> bool:
        """No sample repeated, none skipped, and every redone step on the same samples."""
        return not (self.num_repeated or self.num_skipped or self.num_differing_steps)

    def __str__(self) -> str:
        verdict = "passed" if self.is_good else "FAILED"
        return (
            f"{verdict}: epoch {self.epoch} = {self.num_before} samples before step "
            f"{self.restored_step} + {self.num_after} after it; planned {self.num_planned}, "
            f"repeated {self.num_repeated}, skipped {self.num_skipped}; "
            f"{self.num_redone_steps} redone steps, {self.num_differing_steps} of them different"
        )


def read_global_batches(files: list[Path]) -> dict[int, GlobalBatch]:
    """Read `samples.rank-R.jsonl` of every rank of one run, by step.

    A step counts when all ranks recorded it: a kill reaches them at different moments.
    """
    parts: dict[int, list[GlobalBatch]] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # torn by the kill
                continue
            part = GlobalBatch(record["epoch"], tuple(record["ids"]))
            parts.setdefault(record["step"], []).append(part)
    return {
        step: GlobalBatch(ranks[0].epoch, tuple(sorted(id_ for part in ranks for id_ in part.ids)))
        for step, ranks in sorted(parts.items())
        if len(ranks) == len(files)
    }


def check_resume(
    before: dict[int, GlobalBatch],
    after: dict[int, GlobalBatch],
    restored_step: int,
    num_planned: int,
) -> ResumeCheck:
    """Compare both halves; `num_planned` is how many samples the interrupted epoch holds."""
    epoch = before[restored_step].epoch
    first = [
        id_
        for step, batch in before.items()
        if batch.epoch == epoch and step <= restored_step
        for id_ in batch.ids
    ]
    second = [id_ for batch in after.values() if batch.epoch == epoch for id_ in batch.ids]
    uses = Counter(first + second)
    redone = [step for step in after if step in before]
    return ResumeCheck(
        restored_step=restored_step,
        epoch=epoch,
        num_before=len(first),
        num_after=len(second),
        num_planned=num_planned,
        num_repeated=sum(count - 1 for count in uses.values()),
        num_skipped=num_planned - len(uses),
        num_redone_steps=len(redone),
        num_differing_steps=sum(after[step] != before[step] for step in redone),
    )
