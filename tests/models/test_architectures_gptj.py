"""GPT-J: every value of every layer is the one that the model itself computes."""

import pytest
import torch
from helpers.architecture_checks import assert_exact_at_sites, assert_traced
from helpers.families import FAMILIES
from helpers.plain_blocks import TOKENS, run_blocks

from causalcone.engine.errors import ModelError
from causalcone.engine.models import read_architecture

gptj = FAMILIES["gptj"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("layers", "width", "heads", "rotary"), [(2, 16, 1, 2), (3, 24, 3, 8), (4, 48, 4, 6)])
def test_shapes(layers, width, heads, rotary, tied):
    assert_exact_at_sites(gptj(layers, width, heads, rotary_dim=rotary, tie_word_embeddings=tied))


@pytest.mark.parametrize("options", [{"n_inner": 20}, {"activation_function": "silu"}, {"layer_norm_epsilon": 0.1}])
def test_options(options):
    assert_exact_at_sites(gptj(2, 24, 2, seed=1, **options))


def test_the_tables_are_the_models_own():
    model = gptj(2, 24, 2)
    for block in model.transformer.h:
        block.attn.embed_positions = torch.randn(block.attn.embed_positions.shape, dtype=torch.float64)
    assert_exact_at_sites(model)


def test_bfloat16():
    """As far from float64 as the model itself."""
    model = gptj(3, 32, 4)
    right = run_blocks(read_architecture(model), TOKENS, torch.float64).log_p
    found = run_blocks(read_architecture(model), TOKENS, torch.bfloat16).log_p
    theirs = model.bfloat16()(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
    assert found.dtype == torch.bfloat16
    assert (found - right).abs().max() < 2 * (theirs - right).abs().max()


def test_refuses_a_model_without_rotary_dimensions():
    with pytest.raises(ModelError, match="rotary_dim"):
        read_architecture(gptj(1, 16, 1, rotary_dim=0))


def test_tracing():
    assert_traced(gptj(3, 24, 2))
