"""Llama and its relatives, Gemma among them: every value of every layer is the one that the model itself computes."""

import pytest
import torch
from helpers.compare import assert_same
from helpers.families import FAMILIES, quick_first
from helpers.models import FACTS, tokenizer
from helpers.plain_blocks import MIDS, TOKENS, TOLERANCE, assert_exact, assert_same_values, run_blocks, run_model
from oracles import tracing as oracle
from torch import nn

import causalcone as cc
from causalcone.engine.errors import ModelError
from causalcone.engine.models import read_architecture

ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", MIDS)
@pytest.mark.parametrize(("layers", "width", "heads"), [(1, 16, 1), (2, 48, 4), (4, 24, 3)])
def test_families(family, layers, width, heads, dtype):
    assert_exact(FAMILIES[family](layers, width, heads, dtype=dtype), MIDS[family])


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True, "hidden_act": "gelu"}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 6}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 14}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None, "head_dim": 10}),
        ("mistral", {"sliding_window": 1}),
        ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
        ("seed_oss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 3}),
        ("granite", {"attention_bias": True, "tie_word_embeddings": True}),
        ("olmo2", {"attention_bias": True}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}),
        ("phi3", {"sliding_window": None, "hidden_act": "gelu_new"}),
        ("starcoder2", {"use_bias": False, "sliding_window": None, "tie_word_embeddings": False}),
    ],
)
def test_options(family, config):
    assert_exact(FAMILIES[family](3, **config), MIDS[family])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_scaled_rotary_positions(family, kind, dtype):
    model = FAMILIES[family](2, rope_parameters=ROPES[kind], dtype=dtype)
    assert model.model.rotary_emb.rope_type == kind
    assert_exact(model, MIDS[family])


def test_rotary_positions_by_type_of_layer():
    ropes = {"sliding_attention": ROPES["linear"], "full_attention": ROPES["yarn"]}
    assert_exact(FAMILIES["olmo3"](4, rope_parameters=ropes), MIDS["olmo3"])


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        ("llama", [None] * 4),
        ("mistral", [4] * 4),
        ("ministral", [4] * 4),
        ("qwen2", [None, 4, 4, 4]),
        ("cwm", [None, 4, 4, 4]),
        ("olmo3", [4, 4, 4, None]),
        ("phi3", [5] * 4),
        ("starcoder2", [5] * 4),
    ],
)
def test_windows(family, windows):
    """The prompts of these tests are longer than the windows, so that those are tried."""
    architecture = read_architecture(FAMILIES[family]())
    assert [architecture.block(i, torch.float64, torch.device("cpu")).window for i in range(4)] == windows
    assert len(TOKENS) > 5


@pytest.mark.parametrize("family", MIDS)
def test_unmodified_model(family):
    """Without lifting, a float64 model rounds to float32 inside and agrees no better."""
    model = FAMILIES[family]()
    found = run_blocks(read_architecture(model), TOKENS, torch.float64)
    assert_same_values(found, run_model(model, TOKENS, "model.layers", MIDS[family], lift=False), 5e-6)


@pytest.mark.parametrize("family", quick_first(MIDS, ("llama", "olmo2", "gemma2")))
def test_tracing(family):
    model, facts = FAMILIES[family](3, 16, 2), FACTS[1:2]
    options = {"states": (("hidden", 1), ("mlp", 2), ("attn", 3)), "samples": 2, "sigma": 0.5}
    table = cc.Tracer(model, tokenizer()).trace(facts, **options)
    assert_same(table, oracle.trace(model, tokenizer(), facts, **options))


@pytest.mark.parametrize("family", MIDS)
def test_bfloat16(family):
    """In bfloat16 the blocks are about as far from the float64 model as the model itself is."""
    model = FAMILIES[family](2, dtype=torch.bfloat16)
    ours = run_blocks(read_architecture(model), TOKENS, torch.bfloat16).hidden.double()
    theirs = run_model(model, TOKENS, "model.layers", MIDS[family]).hidden.double()
    exact = run_blocks(read_architecture(model.double()), TOKENS, torch.float64).hidden
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_parameters_are_read_anew(family):
    model = FAMILIES[family](2)
    architecture = read_architecture(model)
    before = run_blocks(architecture, TOKENS, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.1
    after = run_blocks(architecture, TOKENS, torch.float64)
    assert not torch.equal(before.log_p, after.log_p)
    assert_same_values(after, run_model(model, TOKENS, "model.layers", MIDS[family]), TOLERANCE[torch.float64])


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo3"])
def test_dynamic_rotary_positions_are_refused(family):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    if family == "olmo3":
        rope = {"full_attention": rope, "sliding_attention": ROPES["linear"]}
    with pytest.raises(ModelError, match="'dynamic' depend on the prompt's length"):
        read_architecture(FAMILIES[family](4, rope_parameters=rope))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_longrope_is_refused(family):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    with pytest.raises(ModelError, match="'longrope' depend on the prompt's length"):
        read_architecture(FAMILIES[family](2, rope_parameters=rope))


def test_attention_to_later_tokens_is_refused():
    model = FAMILIES["llama"](1)
    model.config.is_causal = False
    with pytest.raises(ModelError, match=r"later tokens \(is_causal=False\)"):
        read_architecture(model)


def test_other_layer_types_are_refused():
    model = FAMILIES["qwen2"](2)
    model.config.layer_types[1] = "chunked_attention"
    with pytest.raises(ModelError, match="layer 1 has 'chunked_attention'"):
        read_architecture(model)


class Adapter(nn.Linear):
    """Stands for a wrapped projection."""


class Norm(nn.LayerNorm):
    """Stands for a norm by other code."""


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.up_proj", "post_attention_layernorm"])
def test_unexpected_modules_are_refused(name):
    model = FAMILIES["llama"](2)
    parent, child = f"model.layers.1.{name}".rsplit(".", 1)
    setattr(model.get_submodule(parent), child, Norm(32) if "norm" in name else Adapter(32, 16))
    with pytest.raises(ModelError, match=f"the module model.layers.1.{name} is a"):
        read_architecture(model)
