"""Phi: every value of every layer is the one that the model itself computes."""

import pytest
from helpers.architecture_checks import assert_exact_at_sites, assert_traced
from helpers.families import FAMILIES

from causalcone.engine.errors import ModelError
from causalcone.engine.models import read_architecture

phi = FAMILIES["phi"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("layers", "width", "heads", "share"), [(2, 16, 1, 0.25), (3, 24, 3, 1.0), (4, 48, 4, 0.5)])
def test_shapes(layers, width, heads, share, normed, tied):
    options = {"partial_rotary_factor": share, "qk_layernorm": normed, "tie_word_embeddings": tied}
    assert_exact_at_sites(phi(layers, width, heads, **options))


@pytest.mark.parametrize("options", [{"num_key_value_heads": 4}, {"hidden_act": "relu"}, {"layer_norm_eps": 0.1}])
def test_options(options):
    assert_exact_at_sites(phi(2, 32, 4, seed=1, **options))


def test_scaled_rotary_positions():
    rope = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0, "partial_rotary_factor": 0.5}
    assert_exact_at_sites(phi(2, 32, 4, rope_parameters=rope))


def test_refuses_rotary_positions_that_depend_on_the_length():
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0, "partial_rotary_factor": 0.5}
    with pytest.raises(ModelError, match="dynamic"):
        read_architecture(phi(1, 32, 4, rope_parameters=rope))


def test_tracing():
    assert_traced(phi(3, 24, 2))
