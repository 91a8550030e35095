"""However few factors of second moments are kept, a job makes each of them once, and edits are those made with all."""

import pytest
import torch
from helpers.editing_cases import EVERY_PROBLEM, MEMIT, ROME, editor, error, weight

import causalcone as cc
from causalcone.engine.edit.methods.closed_forms.emmet import EmmetHparams
from causalcone.engine.edit.methods.closed_forms.encore import EncoreHparams
from causalcone.engine.edit.methods.value_search import EditObjective
from causalcone.engine.edit.moments import moments as moments_module

WINDOWS = {
    "rome": (1, ROME),
    **dict.fromkeys(("memit", "memit_joint", "memit-merge"), (3, MEMIT)),
    "encore": (3, EncoreHparams(steps=4, stop_loss=None, covariance_weight=5.0)),
    "emmet": (1, EmmetHparams(steps=4, stop_loss=None)),
}


@pytest.fixture
def factorised(monkeypatch):
    """The matrices that were factorised."""
    seen, factorise = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: seen.append(matrix.clone()) or factorise(matrix))
    return seen


@pytest.fixture
def searches(monkeypatch):
    """How many requests each search for vectors had."""
    seen, search = [], EditObjective.search
    monkeypatch.setattr(
        EditObjective, "search", lambda self, *more: seen.append(len(self.goals)) or search(self, *more)
    )
    return seen


def keeping(monkeypatch, moments, count):
    """The same moments, of whose factors no more are kept at a time."""
    monkeypatch.setattr(moments_module, "_FACTOR_BYTES", count * 8 * moments.width(0) ** 2)
    return cc.Moments(moments.matrices, moments.tokens)


def made(model, moments, method, requests=EVERY_PROBLEM, layers="all", **options):
    window, hparams = WINDOWS[method]
    return list(editor(model, moments, **options).batches(requests, method, layers, window, hparams))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("method", "memory"), [("rome", "4.5MB"), *((name, None) for name in WINDOWS if name != "rome")]
)
def test_a_job_factorises_each_moment_once(model, moments, monkeypatch, factorised, searches, method, memory, count):
    expected = [edit for batch in made(model, moments, method) for edit in batch]
    factorised.clear()
    searches.clear()
    batches = made(model, keeping(monkeypatch, moments, count), method, memory=memory)
    assert len(factorised) == 4
    assert (len(searches) > 1) == (memory is not None)
    found = [edit for batch in batches for edit in batch]
    assert [edit.edit_id for edit in found] == [edit.edit_id for edit in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.delta.layers == other.delta.layers
        for layer in one.delta.layers:
            assert error(weight(one.delta, layer), weight(other.delta, layer), 1e-5) < 1e-9


@pytest.mark.parametrize("method", ["memit", "memit_joint"])
def test_lists_of_layers_that_interleave(model, moments, monkeypatch, factorised, method):
    """In whatever order they are asked for."""
    made(model, keeping(monkeypatch, moments, 1), method, layers=((1, 3), (0, 3), (0, 1, 2), (3,)))
    assert len(factorised) == 4


@pytest.mark.parametrize("method", ["memit", "memit_joint"])
def test_what_waits_for_its_layers_takes_a_share_of_the_memory(model, moments, monkeypatch, factorised, method):
    """Beyond it a layer has another turn."""
    batches = made(model, keeping(monkeypatch, moments, 1), method, 2 * EVERY_PROBLEM, memory="4.5MB")
    assert len(batches) > 1
    assert 4 < len(factorised) <= 4 * len(batches)


@pytest.mark.parametrize("method", ["rome", "memit_joint"])
def test_batches_come_one_by_one_where_all_factors_are_kept(model, moments, monkeypatch, factorised, searches, method):
    own = keeping(monkeypatch, moments, 4)
    window, hparams = WINDOWS[method]
    batches = editor(model, own, memory="4.5MB").batches(EVERY_PROBLEM, method, "all", window, hparams)
    next(batches)
    before = len(searches)
    assert list(batches)
    assert len(searches) > before
    assert len(factorised) == 4
