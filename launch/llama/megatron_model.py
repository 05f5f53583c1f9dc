"""The Llama of the other scripts as Megatron-core builds it: its layout decides which part of it a rank gets."""

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

from launch.llama.megatron_settings import MegatronRunSettings, MegatronSettings

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def transformer_config(settings: MegatronRunSettings) -> TransformerConfig:
    """RMSNorm, SwiGLU, rotary positions, no biases, no dropout."""
    model, megatron = settings.model, settings.megatron
    dtype = DTYPES[megatron.precision]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads or model.num_heads,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=model.initializer_range,
        # On the host a seed gives the same weights at every tensor-parallel size.
        use_cpu_initialization=True,
        tensor_model_parallel_size=megatron.tensor_model_parallel_size,
        pipeline_model_parallel_size=megatron.pipeline_model_parallel_size,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=megatron.precision == "bf16",
        # Kernels of Transformer Engine and apex, which need not be installed.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def model_provider(
    settings: MegatronRunSettings, config: TransformerConfig, pre_process: bool, post_process: bool
) -> GPTModel:
    """This rank's part: with `pre_process` it begins with the embedding, with `post_process` it ends
    with the output layer and the loss."""
    model = settings.model
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=padded_vocab_size(model.vocab_size, settings.megatron),
        max_sequence_length=settings.data.seq_len,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
    )


def build_stage(settings: MegatronRunSettings, config: TransformerConfig) -> GPTModel:
    """The part that parallel_state gives this rank; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.train.seed)
        return model_provider(
            settings,
            config,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )


def padded_vocab_size(vocab_size: int, megatron: MegatronSettings) -> int:
    """The rows of the embedding, a multiple of the ranks that share it."""
    parts = megatron.tensor_model_parallel_size
    return -(-vocab_size // parts) * parts
