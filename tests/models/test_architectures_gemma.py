"""Gemma 1, 2 and 3: the options that only they have. What they share with Llama is in test_architectures_llama.py."""

import pytest
import torch
from helpers.families import FAMILIES
from helpers.plain_blocks import MIDS, TOKENS, assert_exact

from causalcone.engine.errors import ModelError
from causalcone.engine.models import family_of, read_architecture

GEMMAS = ("gemma", "gemma2", "gemma3_text")
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}


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


@pytest.mark.parametrize("family", GEMMAS)
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


@pytest.mark.parametrize("family", GEMMAS)
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
