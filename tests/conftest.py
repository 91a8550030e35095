"""Fixtures and marks that all tests share."""

import pytest
import torch
from models import gpt2, tokenizer

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it computes


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", name="tokenizer")
def session_tokenizer():
    return tokenizer()


@pytest.fixture(scope="module")
def model():
    """A float64 GPT-2 of four layers that no test may change."""
    return gpt2()
