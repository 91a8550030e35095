"""OPT: every value of every layer is the one that the model itself computes."""

import pytest
from helpers.architecture_checks import assert_exact_at_sites, assert_traced
from helpers.families import FAMILIES

from causalcone.engine.errors import ModelError
from causalcone.engine.models import read_architecture

opt = FAMILIES["opt"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("layers", "width", "heads"), [(2, 16, 1), (3, 24, 3), (4, 48, 4)])
def test_shapes(layers, width, heads, tied):
    assert_exact_at_sites(opt(layers, width, heads, tie_word_embeddings=tied))


@pytest.mark.parametrize(
    "options",
    [
        {"enable_bias": False},
        {"layer_norm_elementwise_affine": False},
        {"_remove_final_layer_norm": True},
        {"activation_function": "gelu"},
    ],
    ids=str,
)
def test_options(options):
    assert_exact_at_sites(opt(2, 24, 2, seed=1, tie_word_embeddings=False, **options))


@pytest.mark.parametrize("options", [{"do_layer_norm_before": False}, {"word_embed_proj_dim": 16}], ids=str)
def test_refuses_by_name(options):
    with pytest.raises(ModelError, match=next(iter(options))):
        read_architecture(opt(1, 24, 2, **options))


def test_tracing():
    assert_traced(opt(3, 24, 2))
