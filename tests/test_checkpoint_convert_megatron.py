"""A Megatron GPT model as a Llama of transformers: the same logits, or refused by the field's name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from effx_dist.checkpoint import Checkpointer
from effx_dist.checkpoint.tools.convert import ConvertOptions, convert_checkpoint
from effx_dist.checkpoint.tools.convert.megatron_llama import llama_weights, transformer_of
from effx_dist.config import ExcpConfig
from effx_dist.errors import ConfigError
from tests.megatron_processes import needs_megatron
from tests.ranks import spawn

CONFIG = ExcpConfig(profile="lossless", async_mode="sync", keep_latest_k=0)
LAYOUT = {
    "num_layers": 2,
    "hidden_size": 8,
    "ffn_hidden_size": 12,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 3,
    "padded_vocab_size": 16,
}
TRANSFORMER: dict[str, Any] = LAYOUT | {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation": "silu",
    "layernorm_epsilon": 1e-5,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "max_sequence_length": 32,
    "vocab_size": None,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
    "num_moe_experts": None,
    "rope_scaling": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "tied, padded": {"tied": True, "vocab_size": 90},
    "one group, wide heads": {"config": {"num_query_groups": 1, "kv_channels": 16}},
    "no groups, biases": {"config": {"num_query_groups": 4, "add_bias_linear": True}},
    "bias of queries, keys, values": {"config": {"add_qkv_bias": True}},
    "names of Transformer Engine": {"is_engine": True, "config": {"layernorm_epsilon": 0.1}},
}
"""What differs from the small model of tests/megatron_runs.py."""


class Tree(torch.nn.Module):
    """Parameters under names with dots."""

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, values in parameters.items():
            *parents, leaf = name.split(".")
            place: torch.nn.Module = self
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, torch.nn.Module())
                place = place.get_submodule(parent)
            place.register_parameter(leaf, torch.nn.Parameter(values.clone()))


def save(folder: Path, parameters: dict[str, torch.Tensor], **transformer: Any) -> None:
    """A checkpoint as a Megatron run writes it."""
    model = Tree(parameters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    said = {"version": "0.16.1", "transformer": TRANSFORMER | transformer}
    with Checkpointer(folder, CONFIG) as checkpointer:
        checkpointer.save(1, model, optimizer, extra={"megatron": said})


def logits_of_megatron(folder: Path) -> dict[str, torch.Tensor]:
    """Save each of MODELS in a folder of its name; return what they make of :func:`tokens_of`."""
    from tests import megatron_runs as runs  # before megatron, which it makes run on a CPU

    # isort: split
    from effx_dist.engines.megatron.checkpoint import description_of

    found = {}
    for name, difference in MODELS.items():
        options = {"tied": difference.get("tied", False), "config": difference.get("config", {})}
        case = runs.Case(**options)
        with runs.parallel(case), torch.no_grad():
            model = runs.gpt_model(case)
            for parameter in model.parameters():  # norms and biases, too, so that they matter
                parameter.add_(torch.randn_like(parameter) / 4)
            tokens = tokens_of(difference)
            mask = torch.ones(runs.SEQUENCE, runs.SEQUENCE, dtype=torch.bool).triu(1)[None, None]
            positions = torch.arange(runs.SEQUENCE).expand_as(tokens)
            found[name] = model(tokens, positions, mask)
        said = description_of([model], difference.get("vocab_size"))
        parameters = dict(model.named_parameters())
        if difference.get("is_engine"):
            parameters = {as_engine_names(name): p for name, p in parameters.items()}
        save(folder / name, parameters, **said)
    return found


def as_engine_names(name: str) -> str:
    """Of a parameter in layers of Transformer Engine, from its name in Megatron's own."""
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def tokens_of(difference: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, difference.get("vocab_size", 96), (2, 16), generator=generator)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a checkpoint of each of MODELS, and what Megatron makes of the tokens."""
    folder = tmp_path_factory.mktemp("megatron")
    [logits] = spawn(1, logits_of_megatron, folder / "ranks", folder)
    return folder, logits


@pytest.mark.megatron
@pytest.mark.ranks
@needs_megatron
class TestLogits:
    @pytest.mark.parametrize("name", MODELS)
    def test_are_those_of_the_llama(
        self, name: str, written: tuple[Path, dict[str, Any]], tmp_path: Path
    ) -> None:
        transformers = pytest.importorskip("transformers")
        folder, expected = written
        options = ConvertOptions(max_shard_size="20kB")
        convert_checkpoint(folder / name, "safetensors", tmp_path / "out", options=options)
        model, told = transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True, attn_implementation="eager"
        )
        assert not any(told.values())  # nothing missing, unexpected, or of another shape
        with torch.no_grad():
            logits = model(tokens_of(MODELS[name])).logits
        size = MODELS[name].get("vocab_size", 96)
        assert logits.shape[-1] == size
        assert logits.std() > 1
        torch.testing.assert_close(logits, expected[name][..., :size], rtol=0, atol=1e-4)


def tensors_of(**difference: Any) -> dict[str, torch.Tensor]:
    """Tensors of a Megatron model's shapes, no two of their values equal."""
    said = TRANSFORMER | difference
    hidden, ffn, head = said["hidden_size"], said["ffn_hidden_size"], said["kv_channels"]
    heads, groups = said["num_attention_heads"], said["num_query_groups"]
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (said["padded_vocab_size"], hidden),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (said["padded_vocab_size"], hidden),
    }
    for layer in range(said["num_layers"]):
        shapes |= {
            f"decoder.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": (hidden,),
                "self_attention.linear_qkv.weight": ((heads + 2 * groups) * head, hidden),
                "self_attention.linear_proj.weight": (hidden, heads * head),
                "pre_mlp_layernorm.weight": (hidden,),
                "mlp.linear_fc1.weight": (2 * ffn, hidden),
                "mlp.linear_fc2.weight": (hidden, ffn),
            }.items()
        }
    numel = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    values = torch.arange(float(sum(numel.values()))).split(list(numel.values()))
    return {name: v.view(shapes[name]) for name, v in zip(shapes, values, strict=True)}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    save(folder, tensors_of())
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def with_config(**config: Any) -> ConvertOptions:
    return ConvertOptions(config=config)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_row_is_used_once(groups: int, has_bias: bool) -> None:
    said = TRANSFORMER | {"num_query_groups": groups, "add_bias_linear": has_bias}
    shapes = {name: tuple(t.shape) for name, t in tensors_of(**said).items()}
    if has_bias:
        biases = {n.replace("weight", "bias"): s[:1] for n, s in shapes.items() if "linear" in n}
        shapes |= biases
    weights = llama_weights(transformer_of({"transformer": said}, "here"), shapes, 16, "here")
    used = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for weight in weights.values():
        for box in weight.boxes:
            used[weight.source][box.slices] += 1
    assert all(bool((count == 1).all()) for count in used.values())


def test_what_is_read_is_what_is_written(chain: Path, tmp_path: Path) -> None:
    """A fused tensor is decoded once for all of its parts, and of the vocabulary no padding."""
    seen: list[tuple[int, int]] = []
    convert_checkpoint(
        chain,
        "safetensors",
        tmp_path / "out",
        options=with_config(vocab_size=11),
        on_progress=lambda done, total: seen.append((done, total)),
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    num_bytes = sum(t.nbytes for t in tensors.values())
    assert seen[-1] == (num_bytes, num_bytes)
    groups = tensors_of()["decoder.layers.1.self_attention.linear_qkv.weight"].view(2, 4, 3, 8)
    layer = "model.layers.1.self_attn"
    assert torch.equal(tensors[f"{layer}.q_proj.weight"], groups[:, :2].reshape(12, 8))
    assert torch.equal(tensors[f"{layer}.k_proj.weight"], groups[:, 2].reshape(6, 8))
    assert torch.equal(tensors[f"{layer}.v_proj.weight"], groups[:, 3].reshape(6, 8))


class TestOtherTargets:
    """They keep Megatron's names."""

    def test_torch(self, chain: Path, tmp_path: Path) -> None:
        convert_checkpoint(chain, "torch", tmp_path / "out.pt")
        file = torch.load(tmp_path / "out.pt", weights_only=True)
        expected = tensors_of()
        assert file["model"].keys() == expected.keys()
        assert all(torch.equal(file["model"][name], expected[name]) for name in expected)
        assert file["extra"]["megatron"]["transformer"] == TRANSFORMER

    def test_dcp(self, chain: Path, tmp_path: Path) -> None:
        convert_checkpoint(chain, "dcp", tmp_path / "out")
        reader = torch.distributed.checkpoint.FileSystemReader(tmp_path / "out")
        names = reader.read_metadata().state_dict_metadata
        assert {f"model.{name}" for name in tensors_of()} <= set(names)
        assert {f"optim.state.{name}.exp_avg" for name in tensors_of()} <= set(names)

    def test_universal(self, chain: Path, tmp_path: Path) -> None:
        convert_checkpoint(chain, "universal", tmp_path / "out")
        for name, values in tensors_of().items():
            file = torch.load(tmp_path / "out" / "global_step1" / "zero" / name / "fp32.pt")
            assert torch.equal(file["param"], values)


class TestConfiguration:
    def test_is_that_of_the_model(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        save(tmp_path / "chain", tensors_of(), rotary_base=5000, layernorm_epsilon=0.01)
        convert_checkpoint(tmp_path / "chain", "safetensors", tmp_path / "out")
        config = transformers.LlamaConfig.from_pretrained(tmp_path / "out")
        assert config.rope_parameters["rope_theta"] == 5000
        assert (config.rms_norm_eps, config.head_dim, config.vocab_size) == (0.01, 3, 16)
        assert config.max_position_embeddings == 32

    def test_a_given_one_lies_over_it(self, tmp_path: Path) -> None:
        scaling = {"rope_type": "linear", "factor": 2.0}
        save(tmp_path / "chain", tensors_of(), rope_scaling=True)
        options = with_config(rope_scaling=scaling, eos_token_id=7)
        convert_checkpoint(tmp_path / "chain", "safetensors", tmp_path / "out", options=options)
        config = config_of(tmp_path / "out")
        assert (config["rope_scaling"], config["eos_token_id"]) == (scaling, 7)
        assert config["num_hidden_layers"] == 2

    @pytest.mark.parametrize(
        ("name", "value"), [("num_attention_heads", 8), ("vocab_size", 17), ("vocab_size", "a")]
    )
    def test_one_of_another_model_is_refused(
        self, name: str, value: object, chain: Path, tmp_path: Path
    ) -> None:
        options = with_config(**{name: value})
        with pytest.raises(ConfigError, match=name):
            convert_checkpoint(chain, "safetensors", tmp_path / "out", options=options)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalization", "LayerNorm"),
        ("gated_linear_unit", False),
        ("activation", "gelu"),
        ("position_embedding_type", "learned_absolute"),
        ("rotary_percent", 0.5),
        ("qk_layernorm", True),
        ("num_moe_experts", 4),
        ("rope_scaling", True),
        ("rotary_interleaved", True),
        ("window_size", [4, 0]),
    ],
)
def test_what_no_llama_does_is_refused(field: str, value: object, tmp_path: Path) -> None:
    save(tmp_path / "chain", tensors_of(), **{field: value})
    with pytest.raises(ConfigError, match=re.escape(f"{field}={value!r}") + ".*--to torch"):
        convert_checkpoint(tmp_path / "chain", "safetensors", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["chain"]


@pytest.mark.parametrize(
    ("difference", "named"),
    [
        ({"num_layers": 10**9}, "layers.2.input_layernorm"),
        ({"num_layers": 1}, "no place for decoder.layers.1"),
        ({"share_embeddings_and_output_weights": True}, "no place for output_layer"),
        ({"ffn_hidden_size": 13}, "linear_fc1"),
        ({"num_query_groups": 3}, "num_query_groups=3"),
        ({"num_query_groups": 10**12, "num_attention_heads": 10**12}, "num_query_groups"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"kv_channels": None}, "kv_channels"),
    ],
)
def test_what_does_not_fit_is_refused(
    difference: dict[str, Any], named: str, tmp_path: Path
) -> None:
    save(tmp_path / "chain", tensors_of(), **difference)
    with pytest.raises(ConfigError, match=named):
        convert_checkpoint(tmp_path / "chain", "safetensors", tmp_path / "out")


@pytest.mark.parametrize("megatron", [{}, {"transformer": {"num_layers": 2}}, None, [1]])
def test_what_is_not_said_is_refused(megatron: Any, tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "chain", CONFIG) as checkpointer:
        checkpointer.save(1, Tree(tensors_of()), extra={"megatron": megatron})
    with pytest.raises(ConfigError, match="transformer"):
        convert_checkpoint(tmp_path / "chain", "safetensors", tmp_path / "out")
