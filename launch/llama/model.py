"""A Llama of any size, initialised at random and identically on every rank."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.llama.settings import ModelSettings


def llama_config(model: ModelSettings, seq_len: int) -> LlamaConfig:
    """The `transformers` configuration of these settings."""
    values: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads or model.num_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": seq_len,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": False,
    }
    return LlamaConfig(**values)


def build_llama(model: ModelSettings, seq_len: int, seed: int) -> LlamaForCausalLM:
    """Build the model in float32 on the CPU, where a seed gives the same values on every rank.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama_config(model, seq_len))
