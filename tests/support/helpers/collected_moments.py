"""Second moments of the small model, and how far two of them are apart."""

import itertools

from helpers.models import FACTS

TEXTS = [f"{fact.text} {fact.target_true}" for fact in FACTS]
MANY = [f"{a} {b}" for a, b in itertools.permutations(TEXTS, 2)]
WIDTH = 128
"""Of the model's keys."""


def deviation(found, expected):
    """The largest difference of two matrices, relative to the largest element."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
