"""Whether what was planned is what was trained, from the tallies of all ranks. No communication is performed."""

from __future__ import annotations

from collections.abc import Sequence

from effx_dist.data.epoch_run import EpochRun, Tally
from effx_dist.data.plan import EpochPlan
from effx_dist.data.recorder import HOW_IDS_TRAVEL, Strays


def of_strays(epoch: int, strays: Strays) -> str | None:
    """What is wrong with the ids that one rank has weighed in an epoch; None: nothing."""
    if strays.high >= strays.low:
        shown = f"{strays.low}" if strays.low == strays.high else f"{strays.low}, {strays.high}"
        return (
            f"epoch {epoch}: sample_ids {shown} were weighed, which are not among the samples that this rank has "
            f"in it; {HOW_IDS_TRAVEL}. Where batches are read on one process and dealt out (dispatch_batches of "
            "accelerate), switch that off"
        )
    if strays.num_not_given:
        return (
            f"epoch {epoch}: {strays.num_not_given} samples were weighed that the sampler had not handed out: the ids "
            "in the batches are not those that it gave. Call with_sample_ids on the outermost data set, the one that "
            "the loader reads (outside of Subset, ConcatDataset and the like)"
        )
    return None


def of_next(run: EpochRun, epoch: int) -> str | None:
    """What is wrong with the epoch that is to come next; None: nothing."""
    current = run.plan.epoch
    if epoch == current + 1 or run.is_untouched:
        return None
    return (
        f"set_epoch({epoch}): the sampler stands in epoch {current}, so {current + 1} is the next. Call set_epoch "
        "for every epoch, in a resumed run from sampler.epoch on (with accelerate, loader.set_epoch). A trainer that "
        "counts epochs by the steps of one, as transformers.Trainer does when it resumes, cannot tell them where some "
        "are pruned: load the sampler's state when it has counted, in on_train_begin"
    )


def of_epoch(plan: EpochPlan, tallies: Sequence[Tally], drop_last: bool) -> tuple[str, bool] | None:
    """What all ranks say of an epoch that ends, and whether ``drop_last`` excuses it; None: all was trained."""
    missing = sum(tally.num_missing for tally in tallies)
    if not missing or all(tally.is_untouched for tally in tallies):
        return None
    if any(tally.has_ended for tally in tallies):
        return None
    planned = sum(tally.num_planned for tally in tallies)
    text = (
        f"epoch {plan.epoch} ends, and {missing} of the {planned} samples that were planned for it were not trained: "
        f"{', '.join(str(tally.num_weighed) for tally in tallies[:8])}{', ...' if len(tallies) > 8 else ''} of "
        f"{tallies[0].num_planned} were weighed on the ranks. {_cause(tallies)}. To go on all the same, pass "
        "strict=False"
    )
    return text, drop_last and missing < plan.batches.global_batch


def _cause(tallies: Sequence[Tally]) -> str:
    """What is the likely reason, and what to do."""
    given = [tally.num_given for tally in tallies if tally.num_given is not None]
    planned = tallies[0].num_planned
    if all(not (tally.num_given or tally.num_weighed) for tally in tallies):
        return (
            "A run was resumed within it and nothing was handed out since: begin the loop with sampler.epoch, which "
            "the loaded state stands in"
        )
    if not any(tally.num_weighed for tally in tallies):
        return "No loss was weighed: call sampler.weigh(losses, ids) for every batch"
    if given and max(given) < planned:
        return (
            "The loop ended before the sampler did: if that is meant (max_steps, limit_train_batches), call "
            "sampler.end_epoch() on every rank before the next epoch"
        )
    if any(tally.num_skipped for tally in tallies):
        num_skipped = max(tally.num_skipped for tally in tallies)
        return (
            f"{num_skipped} batches were skipped (skip_first_batches), and no state was "
            "loaded: load_state_dict says what was trained, and brings the scores"
        )
    if all(2 * tally.num_weighed <= tally.num_planned for tally in tallies):
        return (
            "All were handed out, so the loader is likely to be sharded again: give the framework a loader that "
            "it leaves alone"
        )
    return (
        "All were handed out, so the loader has dropped some (give it the sampler's batch_size), or different samples "
        "have the same id (call with_sample_ids on the outermost data set, outside of ConcatDataset)"
    )
