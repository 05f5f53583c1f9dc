"""Megatron-core: a job's checkpoints, written by every rank from the boxes that it holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import megatron.core

from effx_dist.checkpoint import PendingSave
from effx_dist.checkpoint.state.training_state import Stateful
from effx_dist.checkpoint.tools.convert.megatron_llama import MEGATRON
from effx_dist.config import ExcpConfig
from effx_dist.engines.megatron.job_layout import JobLayout
from effx_dist.engines.megatron.live import MegatronState
from effx_dist.engines.megatron.local_tensors import unwrapped
from effx_dist.engines.run_checkpoints import RunCheckpoints
from effx_dist.errors import ConfigError

_SCALER = "grad_scaler"
_SCHEDULER = "opt_param_scheduler"


class JobCheckpoints(RunCheckpoints):
    """Saves and loads a job, at any tensor-, pipeline- and data-parallel size. The part of the handle that
    deals with checkpoints.

    Args:
        layout: of the job.
        excp: the ``excp`` section; None or ``enabled = false`` writes exact, whole checkpoints.
        sampler: gives the sampler whose state travels with the run, if there is one.
        vocabulary: rows of the vocabulary that are no padding, if that is known.
    """

    def __init__(
        self,
        layout: JobLayout,
        excp: ExcpConfig | None,
        sampler: Callable[[], Stateful | None],
        vocabulary: int | None,
    ) -> None:
        super().__init__(excp, sampler)
        self.layout = layout
        self._vocabulary = vocabulary

    def _live(self, with_optimizer: bool = True) -> MegatronState:
        return MegatronState(self.layout, with_optimizer)

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        iteration: int,
        opt_param_scheduler: Stateful | None = None,
        *,
        extra: Mapping[str, Any] | None = None,
        stateful: Mapping[str, Stateful] | None = None,
        tag: str | None = None,
        described: Mapping[str, Any] | None = None,
    ) -> PendingSave:
        """Save everything of the run to ``save_dir/step-N``; returns after the copy of the state. Call on
        every rank.

        Each rank writes the boxes that it holds; nothing is gathered. Master weights, moments, the
        numbers of steps, the options of the groups, loss scale, sampler and the states of the random
        generators are saved.

        Args:
            iteration: optimizer steps taken; names the checkpoint.
            opt_param_scheduler: Megatron's learning rate schedule.
            extra: JSON-like values and tensors by name, the same on every rank.
            stateful: other objects with ``state_dict`` and ``load_state_dict``, by name.
            tag: a name to load it by; see :meth:`Checkpointer.async_save`.
            described: JSON values that describe the job, beside those of the adapter.
        """
        if MEGATRON in (extra or {}):
            raise ConfigError(
                f"extra[{MEGATRON!r}]: the model is described there; take another name"
            )
        told = {
            "version": megatron.core.__version__,
            "transformer": description_of(self.layout.model_chunks, self._vocabulary),
            **(described or {}),
        }
        self.last_save = self.checkpointer(save_dir).async_save(
            iteration,
            self._live(),
            stateful=self._stateful(opt_param_scheduler, stateful),
            extra={**(extra or {}), MEGATRON: told},
            tag=tag,
        )
        return self.last_save

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        opt_param_scheduler: Stateful | None = None,
        *,
        iteration: int | None = None,
        tag: str | None = None,
        load_optimizer: bool = True,
        strict: bool = True,
        stateful: Mapping[str, Stateful] | None = None,
    ) -> dict[str, Any]:
        """Fill the job from the newest checkpoint, or that of ``iteration`` or ``tag``, at any tensor-,
        pipeline- and data-parallel size. Call on every rank.

        Of a vocabulary that is padded differently here, the rows that both have are loaded; others keep
        their weights, and their moments begin at 0.

        Args:
            load_optimizer: False: only the weights and ``extra`` (and ``stateful``, if given).
            strict: see :meth:`Checkpointer.load`.

        Returns the ``extra`` that was saved, with ``extra["step"]``.

        Raises CheckpointNotFoundError, LayoutMismatchError, CorruptCheckpointError; RankFailedError on
        ranks on which all is well.
        """
        found = self.checkpointer(load_dir).load(
            self._live(load_optimizer),
            stateful=self._stateful(opt_param_scheduler, stateful) if load_optimizer else stateful,
            step=iteration,
            tag=tag,
            strict=strict,
        )
        found.pop(MEGATRON, None)
        return found

    def _stateful(
        self, opt_param_scheduler: Stateful | None, others: Mapping[str, Stateful] | None
    ) -> dict[str, Stateful]:
        schedule = None if opt_param_scheduler is None else _Schedule(opt_param_scheduler)
        first = next(iter(self.layout.optimizers), None)  # their scalers are alike
        scaler = getattr(first, "grad_scaler", None)
        return self._with_sampler({**(others or {}), _SCHEDULER: schedule, _SCALER: scaler})


class _Schedule:
    """Megatron's schedule, which takes as many steps as were saved, from wherever it is: a job that goes
    back to an earlier checkpoint would be too far on."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = self._scheduler.state_dict()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scheduler.num_steps = 0
        self._scheduler.load_state_dict(state_dict)


_FIELDS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "normalization", "gated_linear_unit", "layernorm_epsilon", "add_bias_linear"),
    *("add_qkv_bias", "qk_layernorm", "num_moe_experts", "rotary_interleaved", "no_rope_freq"),
    *("layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm"),
    *("softmax_scale", "softmax_type", "window_size", "activation_func_clamp_value"),
    "glu_linear_offset",
)
"""Fields of TransformerConfig that are kept, under its own names."""
_OF_MODEL = (
    *("position_embedding_type", "max_sequence_length", "share_embeddings_and_output_weights"),
    *("rotary_base", "rotary_percent"),
)
"""Attributes of GPTModel that are kept."""


def description_of(model_chunks: Sequence[Any], vocabulary: int | None) -> dict[str, Any]:
    """What sets the shapes and the arithmetic of a GPTModel, as JSON values; None for what the model does
    not say. ``vocabulary`` is the number of rows that are no padding, if known. No communication is
    performed."""
    model = unwrapped(model_chunks[0])
    config = getattr(model, "config", None)
    found = {name: _plain(getattr(config, name, None)) for name in _FIELDS}
    found |= {name: _plain(getattr(model, name, None)) for name in _OF_MODEL}
    activation = getattr(config, "activation_func", None)
    found["activation"] = getattr(activation, "__name__", None)
    found["padded_vocab_size"] = _plain(getattr(model, "vocab_size", None))
    found["vocab_size"] = vocabulary
    positions = getattr(model, "rotary_pos_emb", None)
    found["seq_len_interpolation_factor"] = _plain(
        getattr(positions, "seq_len_interpolation_factor", None)
    )
    found["rope_scaling"] = bool(getattr(model, "rotary_scaling", False))
    return found


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else str(value)
