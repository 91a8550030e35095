"""Systems of equations with second moments, and moments that have no inverse."""

import re

import numpy as np
import pytest
import torch
from helpers.collected_moments import MANY, WIDTH, deviation

from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.errors import ExperimentError


def test_solving(collected):
    keys = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(0))
    C = collected.matrix(1)
    assert C.dtype == collected.solve(1, keys).dtype == torch.float64
    torch.testing.assert_close(C @ collected.solve(1, keys), keys.double(), rtol=0, atol=1e-7)
    ridged = C + 0.03 * C.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(ridged @ collected.solve(1, keys, ridge=0.03), keys.double(), rtol=0, atol=1e-10)
    by_itself = collected.with_ridge(0.03)
    assert torch.equal(by_itself.solve(1, keys), collected.solve(1, keys, ridge=0.03))
    assert torch.equal(by_itself.solve(1, keys, ridge=0), collected.solve(1, keys))
    assert torch.equal(by_itself.matrix(1), C)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["1GiB", "6MiB"])
def test_collected_and_solved_on_a_gpu(model, tokenizer, memory):
    found = Moments.collect(model, tokenizer, MANY, tokens="all", device="cuda", memory=memory, length=16)
    here = Moments.collect(model, tokenizer, MANY, tokens="all", length=16)
    keys = torch.randn(WIDTH, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layer in found.layers:
        assert deviation(found.matrix(layer), here.matrix(layer)) < 1e-9
        solved = here.solve(layer, keys.cuda(), ridge=0.01)
        assert solved.device.type == "cuda"
        assert deviation(solved.cpu(), here.solve(layer, keys, ridge=0.01)) < 1e-9


def test_a_moment_is_factorised_once(collected, monkeypatch):
    own = Moments(collected.matrices, collected.tokens)
    factorised, factorise = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: factorised.append(1) or factorise(matrix))
    keys = torch.ones(WIDTH, 1)
    for _ in range(3):
        own.solve(0, keys)
        own.solve(1, keys)
        own.with_ridge(0.1).solve(0, keys)
    assert len(factorised) == 3
    own._factors.limit = 2 * 8 * WIDTH**2
    own.solve(2, keys)
    assert [key[:2] for key in own._factors.entries] == [(0, 0.1), (2, 0.0)]


def test_keys_of_another_width_are_refused(collected):
    for keys in (torch.ones(WIDTH - 1, 1), torch.ones(WIDTH)):
        with pytest.raises(ExperimentError, match=r"keys \(12.*for the moment of layer 2; give them as \(128, n\)"):
            collected.solve(2, keys)
    with pytest.raises(ExperimentError, match="no moment of layer 7, only of 0, 1, 2, 3"):
        collected.solve(7, torch.ones(WIDTH, 1))
    with pytest.raises(ExperimentError, match="the ridge is -1"):
        collected.solve(0, torch.ones(WIDTH, 1), ridge=-1)
    with pytest.raises(ExperimentError, match="the ridge is nan"):
        collected.with_ridge(float("nan"))


def test_too_few_tokens_for_an_inverse(model, tokenizer):
    few = Moments.collect(model, tokenizer, MANY, (1,), WIDTH - 1)
    with pytest.raises(
        ExperimentError,
        match=r"layer 1, over 127 tokens, .*cannot span keys of width 128 \(condition number infinite.*with_ridge",
    ):
        few.solve(1, torch.ones(WIDTH, 1))
    assert torch.isfinite(few.with_ridge(0.01).solve(1, torch.ones(WIDTH, 1))).all()


def test_keys_that_are_never_there(collected):
    silent = collected.matrix(0).clone()
    silent[5], silent[:, 5] = 0, 0
    found = Moments({0: silent}, {0: 10_000})
    with pytest.raises(ExperimentError, match=r"1 of the 128 components of its keys are zero in all of them"):
        found.solve(0, torch.ones(WIDTH, 1))
    assert torch.isfinite(found.with_ridge(0.01).solve(0, torch.ones(WIDTH, 1))).all()


def spread(smallest, dtype=torch.float64, scale=1.0):
    """A moment whose eigenvalues, at unit diagonal, run from 1 to about ``smallest``."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64, generator=generator))[0]
    matrix = axes * torch.logspace(0, float(np.log10(smallest)), 96, dtype=torch.float64) @ axes.T
    matrix = (matrix + matrix.T) / 2
    by = torch.logspace(0, scale, 96, dtype=torch.float64)
    return (by[:, None] * matrix * by).to(dtype)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e12), (torch.float32, 1e8)])
def test_condition(dtype, limit):
    keys = torch.ones(96, 1)
    Moments({3: spread(30 / limit, dtype)}, {3: 1000}).solve(3, keys)
    hopeless = spread(0.1 / limit, torch.float64).to(dtype)
    with pytest.raises(
        ExperimentError, match=r"hardly vary in some directions \(condition number (\S+), at most"
    ) as told:
        Moments({3: hopeless}, {3: 1000}).solve(3, keys)
    number = re.search(r"condition number (\S+),", str(told.value))[1]
    if dtype == torch.float64:
        wide = hopeless / hopeless.diagonal().sqrt() / hopeless.diagonal().sqrt()[:, None]
        true = torch.linalg.cond(wide).item()
        assert 0.3 * true < float(number) < 1.1 * true
    Moments({3: hopeless}, {3: 1000}).with_ridge(1e-4).solve(3, keys)


def test_components_of_any_size_are_solved():
    """Keys of which some components are 10,000 times as large as others."""
    matrix = spread(1e-7, scale=4.0)
    assert torch.linalg.cond(matrix) > 1e12
    keys = torch.logspace(0, 4, 96, dtype=torch.float64)[:, None]
    found = Moments({0: matrix}, {0: 1000}).solve(0, keys)
    assert deviation(matrix @ found, keys) < 1e-6


def test_moments_of_other_shapes_are_refused():
    for matrix in (torch.ones(3, 4), torch.ones(3), torch.ones(3, 3, dtype=torch.float16)):
        with pytest.raises(ExperimentError, match=r"the moment of layer 2 is \(3.* give \(inner, inner\)"):
            Moments({2: matrix}, {2: 10})
    with pytest.raises(ExperimentError, match="layers 2 with token counts of 1"):
        Moments({2: torch.eye(3)}, {1: 10})
