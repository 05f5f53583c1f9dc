"""A Megatron GPT model under the names of transformers' Llama: which rows become which tensor.

Megatron keeps the queries, keys and values of a layer in one tensor, query group by query group
(the group's query heads, its key, its value), and gate and up of a gated MLP one above the other. Its
rotary embedding turns the two halves of a head, as Llama's does (``rotary_interleaved=False``), so no
row changes its place within a head. Pure functions of what the checkpoint says; nothing is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from effx_dist.errors import ConfigError
from effx_dist.shard import Box, whole_box


@dataclass(frozen=True)
class Weight:
    """A tensor to write: boxes of a tensor of the model, joined along the first dimension.

    Attributes:
        source: name of the model's tensor.
        source_shape: what it must be.
        boxes: at least one.
        is_zero: zeros of the boxes' sizes and the source's dtype are meant, not its values.
    """

    source: str
    source_shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    is_zero: bool = False

    @classmethod
    def whole(cls, source: str, shape: Sequence[int]) -> Weight:
        """A tensor to write that is the whole of a tensor of the model."""
        return cls(source, tuple(shape), (whole_box(shape),))

    @classmethod
    def rows(cls, source: str, shape: Sequence[int], ranges: Sequence[range]) -> Weight:
        """A tensor to write that consists of some rows of a tensor of the model, one range below the other."""
        rest = tuple(shape[1:])
        zeros = (0,) * len(rest)
        boxes = tuple(Box((rows.start, *zeros), (len(rows), *rest)) for rows in ranges)
        return cls(source, tuple(shape), boxes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor to write."""
        if not self.source_shape:
            return ()
        return (sum(box.sizes[0] for box in self.boxes), *self.boxes[0].sizes[1:])

    @property
    def numel(self) -> int:
        """Elements of the tensor to write."""
        return sum(box.numel for box in self.boxes)


MEGATRON = "megatron"
"""Where a Megatron run says in a checkpoint's ``extra`` what its model is."""
TRANSFORMER = "transformer"
REMEDY = "convert to torch or dcp, which keep Megatron's names (--to torch)"
LLAMA: Mapping[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation": "silu",
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "qk_layernorm": False,
    "num_moe_experts": None,
    # Of the following a checkpoint need not speak: not every Megatron-core has them.
    "rotary_interleaved": False,
    "seq_len_interpolation_factor": None,
    "no_rope_freq": None,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "window_size": None,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
}
"""Megatron's options that a Llama leaves no choice about."""
MAX_GROUPS = 2**16
"""Query groups of a layer; no file makes the conversion plan without an end."""
_STATE_OF_ENGINE = "_extra_state"
"""Transformer Engine's bookkeeping beside a layer's weights."""


class Transformer(BaseModel):
    """Megatron's description of its model, under its own names (see ``TransformerConfig`` and
    ``GPTModel`` there); ``vocab_size`` is the tokenizer's, None where it is not known."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: Annotated[int, Field(ge=1, le=MAX_GROUPS)]
    kv_channels: PositiveInt
    normalization: str
    gated_linear_unit: bool
    activation: str
    layernorm_epsilon: float
    add_bias_linear: bool
    add_qkv_bias: bool
    qk_layernorm: bool
    position_embedding_type: str
    rotary_base: float
    rotary_percent: float
    rope_scaling: bool
    max_sequence_length: PositiveInt
    padded_vocab_size: PositiveInt
    vocab_size: PositiveInt | None
    share_embeddings_and_output_weights: bool
    num_moe_experts: int | None

    @property
    def has_attention_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.add_bias_linear or self.add_qkv_bias


def transformer_of(megatron: Any, place: str) -> Transformer:
    """What a checkpoint's ``extra["megatron"]`` says. Raises ConfigError where it does not say enough,
    or says what cannot be."""
    where = f"{place}: extra[{MEGATRON!r}][{TRANSFORMER!r}]"
    try:
        found = Transformer.model_validate(megatron[TRANSFORMER])
    except (ValidationError, TypeError, LookupError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ConfigError(f"{where}: {reason}; {REMEDY}") from None
    heads, groups = found.num_attention_heads, found.num_query_groups
    if heads % groups:
        raise ConfigError(
            f"{where}: num_query_groups={groups} does not divide num_attention_heads={heads}; {REMEDY}"
        )
    return found


def require_llama(transformer: Transformer, place: str, is_rope_given: bool) -> None:
    """Raise ConfigError, naming the field, where the model does what a Llama does not.

    ``is_rope_given``: the user's configuration says how positions are scaled.
    """
    said = transformer.model_dump()
    for name, needed in LLAMA.items():
        if said.get(name) is not None and said[name] != needed:
            raise ConfigError(
                f"{place}: {name}={said[name]!r}: a Llama has {name}={needed!r}; {REMEDY}"
            )
    if transformer.rope_scaling and not is_rope_given:
        raise ConfigError(
            f"{place}: rope_scaling=True: by how much is not stored; say so as "
            f'"rope_scaling" of a config.json (--config FILE), or {REMEDY}'
        )


def llama_config(transformer: Transformer, given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The content of config.json: what the model is, and over it what the user has ``given``.

    Without a tokenizer the tokens that begin and end a text are not known: they are null unless
    given. Raises ConfigError where ``given`` describes other weights.
    """
    fixed = {
        "hidden_size": transformer.hidden_size,
        "intermediate_size": transformer.ffn_hidden_size,
        "num_hidden_layers": transformer.num_layers,
        "num_attention_heads": transformer.num_attention_heads,
        "num_key_value_heads": transformer.num_query_groups,
        "head_dim": transformer.kv_channels,
        "attention_bias": transformer.has_attention_bias,
        "mlp_bias": transformer.add_bias_linear,
        "tie_word_embeddings": transformer.share_embeddings_and_output_weights,
    }
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise ConfigError(
                f"{place}: {name}={given[name]!r} of the given configuration: the model has {value!r}; "
                "leave it out"
            )
    config: dict[str, Any] = fixed | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": transformer.activation,
        "rms_norm_eps": transformer.layernorm_epsilon,
        "rope_theta": transformer.rotary_base,
        "max_position_embeddings": transformer.max_sequence_length,
        "vocab_size": transformer.vocab_size or transformer.padded_vocab_size,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config |= given
    num_words, num_rows = config["vocab_size"], transformer.padded_vocab_size
    if not isinstance(num_words, int) or not 0 < num_words <= num_rows:
        raise ConfigError(
            f"{place}: vocab_size={num_words!r}: the embedding has padded_vocab_size={num_rows} rows; "
            "give a number that is not larger (--config FILE)"
        )
    return config


def llama_weights(
    transformer: Transformer, shapes: Mapping[str, tuple[int, ...]], vocab_size: int, place: str
) -> dict[str, Weight]:
    """Which parts of the model's tensors (of these ``shapes``) become which tensor of a Llama.

    ``vocab_size``: rows of the embedding that are kept; Megatron's padding lies below them. Raises
    ConfigError for a tensor that a Llama has no place for, that is missing, or of another shape.
    """
    hidden = (transformer.hidden_size,)
    vocabulary = (transformer.padded_vocab_size, transformer.hidden_size)
    words = [range(vocab_size)]
    found = {
        "model.embed_tokens.weight": Weight.rows(
            "embedding.word_embeddings.weight", vocabulary, words
        ),
        "model.norm.weight": Weight.whole("decoder.final_layernorm.weight", hidden),
    }
    if not transformer.share_embeddings_and_output_weights:
        found["lm_head.weight"] = Weight.rows("output_layer.weight", vocabulary, words)
    linears = _linears(transformer)
    for layer in range(min(transformer.num_layers, len(shapes))):  # with more, some are missing
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for norm, possible in _NORMS.items():
            source = next((n for n in possible if ours + n in shapes), possible[0])
            found[f"{theirs}{norm}.weight"] = Weight.whole(ours + source, hidden)
        for name, linear in linears.items():
            found |= {theirs + name + kind: weight for kind, weight in linear.weights(ours)}
    _require_fit(found, shapes, place)
    return dict(sorted(found.items()))


def _require_fit(
    found: Mapping[str, Weight], shapes: Mapping[str, tuple[int, ...]], place: str
) -> None:
    needed = {weight.source: weight.source_shape for weight in found.values()}
    left_over = [n for n in shapes if n not in needed and not n.endswith(_STATE_OF_ENGINE)]
    if left_over:
        raise ConfigError(
            f"{place}: a Llama has no place for {min(left_over)} (one of {len(left_over)} such "
            f"tensors); {REMEDY}"
        )
    for name, shape in needed.items():
        if shapes.get(name) != shape:
            raise ConfigError(
                f"{place}: extra[{MEGATRON!r}] lets expect {name} of shape {shape}, and the checkpoint "
                f"has {shapes.get(name) or 'no such tensor'}; {REMEDY}"
            )


_NORMS = {  # of layers of Megatron's own, and of Transformer Engine's, which joins norm and linear
    "input_layernorm": ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    "post_attention_layernorm": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
}


@dataclass(frozen=True)
class _Linear:
    """Rows of one of Megatron's linear layers that are one of Llama's."""

    source: str
    shape: tuple[int, int]
    rows: tuple[range, ...]
    has_bias: bool
    is_bias_needed: bool

    def weights(self, layer: str) -> Iterator[tuple[str, Weight]]:
        weight = f"{layer}{self.source}.weight"
        yield ".weight", Weight.rows(weight, self.shape, self.rows)
        if self.has_bias:
            bias = f"{layer}{self.source}.bias"
            yield ".bias", Weight.rows(bias, self.shape[:1], self.rows)
        elif self.is_bias_needed:  # Llama has one in all of attention or in none
            zeros = (Box((0,), self.shape[:1]),)
            yield ".bias", Weight(weight, self.shape, zeros, is_zero=True)


def _linears(transformer: Transformer) -> dict[str, _Linear]:
    """A layer's linears by Llama's names."""
    hidden, ffn = transformer.hidden_size, transformer.ffn_hidden_size
    groups, head = transformer.num_query_groups, transformer.kv_channels
    queries = transformer.num_attention_heads // groups * head
    per_group = queries + 2 * head

    def of_groups(first: int, num_rows: int) -> tuple[range, ...]:
        starts = range(first, groups * per_group, per_group)
        return tuple(range(start, start + num_rows) for start in starts)

    def attention(rows: tuple[range, ...]) -> _Linear:
        source, shape = "self_attention.linear_qkv", (groups * per_group, hidden)
        return _Linear(source, shape, rows, bias, bias)

    def mlp(source: str, shape: tuple[int, int], rows: range) -> _Linear:
        has_bias = transformer.add_bias_linear
        return _Linear(f"mlp.{source}", shape, (rows,), has_bias, has_bias)

    bias = transformer.has_attention_bias
    return {
        "self_attn.q_proj": attention(of_groups(0, queries)),
        "self_attn.k_proj": attention(of_groups(queries, head)),
        "self_attn.v_proj": attention(of_groups(queries + head, head)),
        "self_attn.o_proj": _Linear(
            "self_attention.linear_proj",
            (hidden, groups * queries),
            (range(hidden),),
            transformer.add_bias_linear,
            bias,
        ),
        "mlp.gate_proj": mlp("linear_fc1", (2 * ffn, hidden), range(ffn)),
        "mlp.up_proj": mlp("linear_fc1", (2 * ffn, hidden), range(ffn, 2 * ffn)),
        "mlp.down_proj": mlp("linear_fc2", (hidden, ffn), range(hidden)),
    }
