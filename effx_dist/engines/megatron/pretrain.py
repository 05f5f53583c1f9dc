"""Megatron-LM's own ``pretrain()``, unforked, with the three techniques::

    with effx.megatron.pretrain_hooks(cfg, train_dataset) as hooks:
        pretrain(hooks.datasets(), model_provider, ModelType.encoder_or_decoder, forward_step)

Megatron-LM is in no package: who trains with it has a checkout of it on Python's path.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import update_num_microbatches
from torch.utils.data import DataLoader

from effx_dist.config import EffxConfig
from effx_dist.data import with_sample_ids
from effx_dist.engines.megatron.handle import Handle, attach
from effx_dist.errors import ConfigError, MissingEngineError

logger = logging.getLogger(__name__)

_TRAINING = "megatron.training.training"
_NAMES = (
    "get_megatron_optimizer",
    "get_optimizer_param_scheduler",
    "load_checkpoint",
    "save_checkpoint",
)
"""What of that module is replaced while the hooks are in place."""
_TRACKER = "latest_checkpointed_iteration.txt"
_COUNTERS = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")


def pretrain_hooks(
    cfg: EffxConfig,
    train_dataset: Any = None,
    *,
    vocab_size: int | None = None,
    num_workers: int = 0,
) -> PretrainHooks:
    """Hooks for one call of Megatron-LM's ``pretrain()``; a context manager around it.

    Args:
        cfg: the sections, as for :func:`attach`.
        train_dataset: map-style; or a function that makes it, called once Megatron is initialised.
            Needed with "infobatch"; its items may be anything that torch's default collate takes.
        vocab_size: as for :func:`attach`.
        num_workers: of the loader over ``train_dataset``.

    Raises MissingEngineError where Megatron-LM cannot be imported.
    """
    return PretrainHooks(cfg, train_dataset, vocab_size, num_workers)


class PretrainHooks:
    """What :func:`pretrain_hooks` gives.

    While it is entered, the optimizer is attached when Megatron has made it, checkpoints are saved to
    ``--save`` and loaded from ``--load`` by this library (a folder that holds Megatron's own is loaded by
    Megatron), and with InfoBatch the samples, their epochs and the learning rate follow its plan: run
    with ``--dataloader-type external``, and with ``--train-iters`` as an upper bound, since a pruned epoch
    has fewer steps; training ends with the data. ``forward_step`` weighs::

        losses = hooks.handle.sample_losses(output_tensor, loss_mask)
        return hooks.handle.weigh(losses, batch["sample_id"]), {"lm loss": losses.detach().mean()}

    Attributes:
        handle: of :func:`attach`; None before Megatron has made the optimizer.
    """

    def __init__(
        self, cfg: EffxConfig, train_dataset: Any, vocab_size: int | None, num_workers: int
    ) -> None:
        self._cfg = cfg
        self._given = train_dataset
        self._dataset: Any = None
        self._vocab_size = vocab_size
        self._num_workers = num_workers
        self._training = _megatron_lm()
        self._own: dict[str, Any] = {}
        self._is_loading = False
        self.handle: Handle | None = None

    def __enter__(self) -> PretrainHooks:
        self._own = {name: getattr(self._training, name) for name in _NAMES}
        for name in _NAMES:
            setattr(self._training, name, getattr(self, f"_{name}"))
        return self

    def __exit__(self, *_: object) -> None:
        """Put Megatron's functions back and finish a save in flight. Raises what made that fail."""
        for name, function in self._own.items():
            setattr(self._training, name, function)
        if self.handle is not None:
            self.handle.close()

    def datasets(self, valid: Any = None, test: Any = None) -> Callable[..., tuple[Any, Any, Any]]:
        """What ``pretrain`` takes as its provider of data sets, with ``--dataloader-type external``: batches
        of the training samples that InfoBatch keeps, the ids of the samples under "sample_id" (behind the
        last element where a batch is no mapping), and iterators of yours for the others."""

        def provide(*_: Any, **__: Any) -> tuple[Any, Any, Any]:
            kind = self._arguments().dataloader_type
            if kind != "external":
                raise ConfigError(
                    f"--dataloader-type {kind}: Megatron would sample the plan once more; must be external"
                )
            return self._batches(), valid, test

        # on every rank: the tensor-parallel ranks of a model read the same samples, each for itself
        provide.is_distributed = True  # type: ignore[attr-defined]
        return provide

    def _batches(self) -> Iterator[Any]:
        """The batches of all epochs. The next epoch is planned at the end of a step, where all ranks are."""
        sampler = self._required.sampler
        if sampler is None:
            raise ConfigError("effx.infobatch: is off; give Megatron a loader of your own")
        while sampler.inner.num_remaining:
            yield from DataLoader(
                with_sample_ids(self._dataset),
                batch_sampler=sampler,
                num_workers=self._num_workers,
                pin_memory=torch.cuda.is_available(),
            )

    @property
    def _required(self) -> Handle:
        if self.handle is None:
            raise ConfigError(
                "effx_dist.megatron.pretrain_hooks: Megatron has made no optimizer yet; call pretrain() within "
                "the `with` block"
            )
        return self.handle

    def _arguments(self) -> Any:
        return self._training.get_args()

    def _get_megatron_optimizer(
        self, config: Any, model_chunks: Any, *args: Any, **kwargs: Any
    ) -> Any:
        optimizer = self._own["get_megatron_optimizer"](config, model_chunks, *args, **kwargs)
        self.handle = attach(optimizer, model_chunks, self._cfg, vocab_size=self._vocab_size)
        if self._cfg.on.infobatch is not None:
            self._make_sampler(self.handle)
        return optimizer

    def _make_sampler(self, handle: Handle) -> None:
        if self._given is None:
            raise ConfigError("effx.infobatch: is on, so pretrain_hooks needs the train_dataset")
        # looked up in the type: a data set's class has it too, and makes one
        is_made = hasattr(type(self._given), "__getitem__")
        self._dataset = self._given if is_made else self._given()
        arguments = self._arguments()
        sampler = handle.make_sampler(
            len(self._dataset),
            micro_batch_size=arguments.micro_batch_size,
            global_batch_size=arguments.global_batch_size,
        )
        sampler.set_epoch(0)

    def _get_optimizer_param_scheduler(self, optimizer: Any) -> Any:
        scheduler = self._own["get_optimizer_param_scheduler"](optimizer)
        handle = self._required
        if handle.sampler is not None:
            own_step = scheduler.step

            def step(increment: int) -> None:
                """At the end of Megatron's step, on every rank. A schedule that is loaded steps as well."""
                if self._is_loading:
                    own_step(increment)
                    return
                scheduler.step = own_step  # which advance calls
                try:
                    handle.advance(scheduler)
                finally:
                    scheduler.step = step
                self._go_on(handle)

            scheduler.step = step
        return scheduler

    def _go_on(self, handle: Handle) -> None:
        """Begin the next epoch if this one has been trained; after the last one, end the training."""
        assert handle.sampler is not None, "the caller looks"
        assert self._cfg.infobatch is not None, "else there is no sampler"
        inner, arguments = handle.sampler.inner, self._arguments()
        num_epochs = self._cfg.infobatch.num_epochs
        if inner.num_remaining:
            return
        if inner.epoch + 1 < num_epochs:
            handle.sampler.set_epoch(inner.epoch + 1)
        elif arguments.train_iters > arguments.curr_iteration + 1:
            logger.info(
                "all %d epochs are trained after %d iterations",
                num_epochs,
                arguments.curr_iteration + 1,
            )
            arguments.train_iters = arguments.curr_iteration + 1

    def _save_checkpoint(
        self,
        iteration: int,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        num_floating_point_operations_so_far: Any,
        *_: Any,
        **__: Any,
    ) -> None:
        arguments = self._arguments()
        counters = {name: getattr(arguments, name, 0) for name in _COUNTERS}
        self._required.save_checkpoint(
            arguments.save,
            iteration,
            opt_param_scheduler,
            extra={**counters, "operations": float(num_floating_point_operations_so_far)},
        )

    def _load_checkpoint(self, *args: Any, **kwargs: Any) -> tuple[int, Any]:
        self._is_loading = True
        try:
            return self._load(*args, **kwargs)
        finally:
            self._is_loading = False

    def _load(
        self,
        ddp_model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        load_arg: str = "load",
        strict: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[int, Any]:
        arguments, handle = self._arguments(), self._required
        folder = getattr(arguments, load_arg)
        if folder is None or handle.checkpointer(folder).newest() is None:
            if folder is None or not os.path.isfile(os.path.join(folder, _TRACKER)):
                return 0, 0
            found: tuple[int, Any] = self._own["load_checkpoint"](
                ddp_model, optimizer, opt_param_scheduler, load_arg, strict, *args, **kwargs
            )
            return found
        is_another_run = arguments.finetune or optimizer is None
        extra = handle.load_checkpoint(
            folder,
            None if is_another_run else opt_param_scheduler,
            load_optimizer=not (is_another_run or arguments.no_load_optim),
            strict=strict,
        )
        if is_another_run:
            return 0, 0
        missing = [name for name in (*_COUNTERS, "operations") if name not in extra]
        if missing:  # another engine's checkpoint, or that of a loop of one's own
            logger.warning("%s: has no %s; they count on from here", folder, ", ".join(missing))
        for name in _COUNTERS:
            setattr(arguments, name, int(extra.get(name, getattr(arguments, name, 0))))
        update_num_microbatches(arguments.consumed_train_samples, verbose=True)
        return int(extra["step"]), extra.get("operations", 0)


def _megatron_lm() -> ModuleType:
    try:
        return importlib.import_module(_TRAINING)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("megatron.training"):
            raise
        raise MissingEngineError(
            f"{_TRAINING}: is not to be imported; Megatron-LM is in no package: put a checkout of "
            "github.com/NVIDIA/Megatron-LM on PYTHONPATH",
            name=error.name,
        ) from error
