"""A Megatron model in words, for those that read its checkpoints without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effx_dist.engines.megatron.local_tensors import unwrapped

_FIELDS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "normalization", "gated_linear_unit", "layernorm_epsilon", "add_bias_linear"),
    *("add_qkv_bias", "qk_layernorm", "num_moe_experts", "rotary_interleaved", "no_rope_freq"),
    *("layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm"),
    *("softmax_scale", "softmax_type", "window_size", "activation_func_clamp_value"),
    "glu_linear_offset",
)
"""Of TransformerConfig, under its names."""
_OF_MODEL = (
    *("position_embedding_type", "max_sequence_length", "share_embeddings_and_output_weights"),
    *("rotary_base", "rotary_percent"),
)
"""Of GPTModel."""


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
