"""GPT-NeoX: every value of every layer is the one that the model itself computes."""

import pytest
from helpers.architecture_checks import assert_exact_at_sites, assert_traced
from helpers.families import FAMILIES
from torch import nn

from causalcone.engine.errors import ModelError
from causalcone.engine.models import read_architecture

neox = FAMILIES["gpt_neox"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("layers", "width", "heads", "share"), [(2, 16, 1, 0.25), (3, 24, 3, 1.0), (4, 48, 4, 0.5)])
def test_shapes(layers, width, heads, share, tied, parallel):
    options = {"rotary_pct": share, "tie_word_embeddings": tied, "use_parallel_residual": parallel}
    assert_exact_at_sites(neox(layers, width, heads, **options))


@pytest.mark.parametrize("options", [{"attention_bias": False}, {"hidden_act": "gelu_fast"}, {"layer_norm_eps": 0.1}])
def test_options(options):
    assert_exact_at_sites(neox(2, 24, 2, seed=1, **options))


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 3.0}, YARN], ids=lambda rope: rope["rope_type"])
def test_scaled_rotary_positions(scaling):
    rope = {"rope_theta": 100.0, "partial_rotary_factor": 0.5, **scaling}
    assert_exact_at_sites(neox(2, 32, 2, rope_parameters=rope))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_refuses_rotary_positions_that_depend_on_the_length(scaling):
    model = neox(1, 32, 2, rope_parameters={"rope_theta": 100.0, "partial_rotary_factor": 0.5, **scaling})
    with pytest.raises(ModelError, match=scaling["rope_type"]):
        read_architecture(model)


def test_refuses_another_class_of_module():
    class Adapted(nn.Linear):
        pass

    model = neox(1, 16, 2)
    model.gpt_neox.layers[0].attention.query_key_value = Adapted(16, 48)
    with pytest.raises(ModelError, match="query_key_value is a Adapted"):
        read_architecture(model)


@pytest.mark.parametrize("parallel", [True, False])
def test_tracing(parallel):
    assert_traced(neox(3, 24, 2, use_parallel_residual=parallel))
