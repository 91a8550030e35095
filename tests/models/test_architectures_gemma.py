"""Gemma 1, 2 and 3: every value of every layer is the one that the model itself computes."""

import pytest
import torch
from helpers.compare import assert_same
from helpers.families import FAMILIES
from helpers.models import FACTS, tokenizer
from helpers.plain_blocks import TOKENS, TOLERANCE, assert_exact, assert_same_values, run_blocks, run_model
from oracles import tracing as oracle

import causalcone as cc
from causalcone.engine.errors import ModelError
from causalcone.engine.models import family_of, read_architecture

MIDS = {
    "gemma": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "gemma3_text": "pre_feedforward_layernorm",
}
"""By family: the module of a layer that takes in the residual stream after attention."""

LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", MIDS)
@pytest.mark.parametrize(("layers", "width", "heads"), [(1, 16, 1), (2, 48, 4), (4, 24, 3)])
def test_families(family, layers, width, heads, dtype):
    assert_exact(FAMILIES[family](layers, width, heads, dtype=dtype), MIDS[family])


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gemma", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
        ("gemma", {"attention_bias": True, "rope_parameters": LINEAR}),
        ("gemma2", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma2", {"attention_bias": True, "hidden_activation": "silu", "rope_parameters": LINEAR}),
        ("gemma2", {"layer_types": ["full_attention", "full_attention", "sliding_attention"], "sliding_window": 2}),
        ("gemma3_text", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
        ("gemma3_text", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
        ("gemma3_text", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": None}}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 3, "attention_bias": True}),
    ],
)
def test_options(family, config):
    assert_exact(FAMILIES[family](3, **config), MIDS[family])


@pytest.mark.parametrize("family", MIDS)
def test_unmodified_model(family):
    """Without lifting, a float64 model rounds to float32 inside and agrees no better."""
    model = FAMILIES[family]()
    found = run_blocks(read_architecture(model), TOKENS, torch.float64)
    assert_same_values(found, run_model(model, TOKENS, "model.layers", MIDS[family], lift=False), 5e-6)


@pytest.mark.parametrize("family", MIDS)
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


@pytest.mark.parametrize("family", MIDS)
def test_embeddings_are_scaled_inside_their_module(family):
    """Noise is added to what the embedding module puts out, so the scale belongs to it."""
    model = FAMILIES[family](1)
    embedded = read_architecture(model).embed(torch.tensor(TOKENS))
    torch.testing.assert_close(
        embedded, model.model.embed_tokens.weight[list(TOKENS)] * model.model.embed_tokens.embed_scale
    )


@pytest.mark.parametrize(("family", "windows"), [("gemma2", [4, None, 4, None]), ("gemma3_text", [4, None, 4, None])])
def test_windows(family, windows):
    architecture = read_architecture(FAMILIES[family]())
    assert [architecture.block(i, torch.float64, torch.device("cpu")).window for i in range(4)] == windows


@pytest.mark.parametrize("family", MIDS)
def test_attention_to_later_tokens_is_refused(family):
    model = FAMILIES[family](2, use_bidirectional_attention=True)
    with pytest.raises(ModelError, match=r"later tokens \(use_bidirectional_attention=True\)"):
        read_architecture(model)


def test_length_dependent_rotary_positions_are_refused():
    ropes = {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "sliding_attention": LINEAR}
    with pytest.raises(ModelError, match="'dynamic' depend on the prompt's length"):
        read_architecture(FAMILIES["gemma3_text"](2, rope_parameters=ropes))


def test_attention_without_softcap_is_refused():
    """Some versions of transformers let Gemma 2 run with an attention that has no soft cap."""
    model = FAMILIES["gemma2"](2)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ModelError, match="attn_implementation='eager'"):
        read_architecture(model)


def test_images_are_refused():
    with pytest.raises(ModelError, match=r"'gemma3' is not supported; supported are: .*gemma3_text"):
        family_of("gemma3")
