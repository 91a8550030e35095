"""GPT-Neo: every value of every layer is the one that the model itself computes."""

import pytest
from helpers.architecture_checks import assert_exact_at_sites, assert_traced
from helpers.families import FAMILIES

gpt_neo = FAMILIES["gpt_neo"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("layers", "width", "heads"), [(2, 16, 1), (3, 24, 3), (4, 48, 4)])
def test_shapes(layers, width, heads, tied):
    assert_exact_at_sites(gpt_neo(layers, width, heads, tie_word_embeddings=tied))


@pytest.mark.parametrize("window", [1, 3, 256])
def test_windows(window):
    assert_exact_at_sites(gpt_neo(2, 24, 2, window_size=window))


@pytest.mark.parametrize("options", [{"intermediate_size": None}, {"activation_function": "relu"}], ids=str)
def test_options(options):
    assert_exact_at_sites(gpt_neo(2, 24, 2, seed=1, **options))


def test_tracing():
    assert_traced(gpt_neo(3, 24, 2, window_size=3))
