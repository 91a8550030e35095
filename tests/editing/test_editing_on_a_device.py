"""Editing and scoring on a CUDA device: the CPU's numbers, no wait but for the losses of a step, and index arrays that
go there once for each set of live edits."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.editing_cases import EVERY_PROBLEM, FORCING, INJECTION, editor, random_moments
from helpers.families import FAMILIES
from helpers.models import gpt2

import causalcone as cc
from causalcone.engine.edit.methods import value_search
from causalcone.engine.edit.methods.closed_forms.alphaedit import AlphaEditHparams
from causalcone.engine.edit.methods.closed_forms.emmet import EmmetHparams
from causalcone.engine.edit.methods.closed_forms.encore import EncoreHparams
from causalcone.engine.edit.methods.closed_forms.spread import Prefixes
from causalcone.engine.edit.methods.fine_tuning.finetune import _EditBatch
from causalcone.engine.edit.methods.fine_tuning.training import Trained, TrainingPass
from causalcone.engine.edit.methods.value_search import ValueOptimizer, _Readings
from causalcone.engine.edit.moments.identity import Identity
from causalcone.engine.edit.scoring.scoring import EditScorer
from causalcone.engine.errors import ModelError
from causalcone.engine.models import read_architecture
from causalcone.engine.models.reference import refuse_unfinite

# edits that stop at different steps: many sets of live edits
ROME = cc.RomeHparams(steps=6, stop_loss=5.0)
MEMIT = cc.MemitHparams(steps=6, stop_loss=5.0, covariance_weight=5.0)
FINETUNE = cc.FinetuneHparams(steps=5, lr=5e-3, norm_constraint=1.2e-2, stop_loss=4.0, noise_samples=3)
METHODS = {
    "rome": lambda ed, layers=(0, 1): ed.rome(EVERY_PROBLEM, layers, ROME),
    "memit": lambda ed, layers=(0, 1): ed.memit(EVERY_PROBLEM, layers, 3, MEMIT),
    "memit_joint": lambda ed, layers=(0, 1): ed.memit(EVERY_PROBLEM, layers, 3, MEMIT, joint=True),
    "finetune": lambda ed, layers=(0, 1): ed.finetune(EVERY_PROBLEM, layers, 3, FINETUNE),
    "memit-seq": lambda ed: in_sequence(ed, "memit-seq", MEMIT),
    "memit-merge": lambda ed: in_sequence(ed, "memit-merge", replace(MEMIT, norm_anchor=2.0)),
    "alphaedit": lambda ed: in_sequence(ed, "alphaedit", AlphaEditHparams(steps=6, ridge=5.0, null_space=1.0)),
    "encore": lambda ed: in_sequence(ed, "encore", EncoreHparams(steps=6, covariance_weight=5.0, patience=1)),
    "emmet": lambda ed: in_sequence(ed, "emmet", EmmetHparams(steps=6, covariance_weight=5.0), [1]),
}


def in_sequence(ed, method, hparams, layers=((0, 1),)):
    """Edits in batches of two, as all together leave them."""
    made = ed.sequence(EVERY_PROBLEM, method, layers, hparams=hparams, batch=2)
    edits = [edit for batch in made for edit in batch.edits]
    return [replace(edit, delta=made.delta) for edit in edits]


WITHOUT_WAITING = {
    "searches": (ValueOptimizer, "find"),
    "MEMIT's passes": (Prefixes, "__init__", "look", "apply"),
    "fine-tuning": (_EditBatch, "_unedited"),
    "its steps": (TrainingPass, "__init__", "evaluate"),
    "and Adam's": (Trained, "step"),
    "scoring": (EditScorer, "_together"),
    "the unedited model": (value_search, "run_unedited"),
}


@pytest.fixture
def strictly(monkeypatch):
    """No pass may wait for the device, but where it asks for results."""
    for owner, *names in WITHOUT_WAITING.values():
        for name in names:
            monkeypatch.setattr(owner, name, strict(getattr(owner, name)))


def strict(function):
    def run(*args, **kwargs):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return run


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("gpt2", name) for name in METHODS), ("llama", "rome"), ("gemma2", "memit"), ("gptj", "finetune")],
)
def test_the_numbers_of_a_cpu_without_a_wait(kind, name, request):
    model = FAMILIES[kind](3, 32, 4, dtype=torch.float32)
    moments, make = random_moments(model), METHODS[name]
    here = editor(model, moments, device="cpu")
    expected = here.evaluate(make(here), accuracy=True)
    request.getfixturevalue("strictly")
    there = editor(model.cuda(), moments)
    found = there.evaluate(make(there), accuracy=True)
    for one, other in zip(found.edits, expected.edits, strict=True):
        assert (one.edit_id, one.status, one.steps) == (other.edit_id, other.status, other.steps)
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
        assert one.delta_norm == pytest.approx(other.delta_norm, rel=1e-2, abs=1e-5)
    for column in ("p_pre", "p_post"):
        torch.testing.assert_close(*(torch.tensor(s.probes.column(column).to_pylist()) for s in (found, expected)),
                                   rtol=1e-2, atol=1e-4)  # fmt: skip


@pytest.fixture
def counted(device, monkeypatch):
    """What a function asks the device for, call by call: uploads and operations of functions by name."""
    if device is None:
        pytest.skip("a real device counts nothing")

    def count(owner, name):
        original, calls = getattr(owner, name), []

        def run(*args, **kwargs):
            before = device.uploads.copy(), device.operations.copy()
            result = original(*args, **kwargs)
            calls.append((sum((device.uploads - before[0]).values()), device.operations - before[1]))
            return result

        monkeypatch.setattr(owner, name, run)
        return calls

    return count


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [(1,), (0, 1, 2, 3, 4)], ids=["one layer", "five"])
@pytest.mark.parametrize("name", ["rome", "memit"])
def test_uploads_of_a_search(counted, name, layers):
    """Two for each set of live edits, and one that says which they are, whatever the edits; none in a step."""
    model = gpt2(6, dtype=torch.float32).cuda()
    searches, sets, steps = (
        counted(ValueOptimizer, "find"),
        counted(_Readings, "__init__"),
        counted(_Readings, "evaluate"),
    )
    METHODS[name](editor(model), layers)
    assert len(sets) > 2
    assert len(steps) >= len(sets) - 1
    assert all(uploads == 0 for uploads, _ in steps)
    assert all(uploads <= 2 for uploads, _ in sets)
    assert sum(uploads for uploads, _ in searches) <= 3 * len(sets)


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [(1,), (0, 1, 2, 3, 4)], ids=["one layer", "five"])
def test_uploads_of_fine_tuning(counted, layers):
    model = gpt2(6, dtype=torch.float32).cuda()
    sets, steps, updates = (
        counted(TrainingPass, "__init__"),
        counted(TrainingPass, "evaluate"),
        counted(Trained, "step"),
    )
    METHODS["finetune"](editor(model), layers)
    assert len(sets) > 1
    assert len(steps) > len(sets)
    assert all(uploads == 0 for uploads, _ in [*steps, *updates])
    assert all(uploads <= 2 for uploads, _ in sets)


@pytest.mark.gpu
def test_uploads_of_the_layers_of_a_window(counted):
    model = gpt2(6, dtype=torch.float32).cuda()
    begun, looks, applied = (counted(Prefixes, name) for name in ("__init__", "look", "apply"))
    METHODS["memit"](editor(model), (1, 2, 3))
    assert [uploads for uploads, _ in begun] == [1, 1, 1]
    assert not any(uploads for uploads, _ in [*looks, *applied])


@pytest.mark.gpu
def test_uploads_of_a_pass_that_scores(counted):
    """As many for twenty edits as for one: texts, runs of both kinds, and what is read of them."""
    model = gpt2(6, dtype=torch.float32).cuda()
    ed = editor(model)
    one, many = ed.rome([INJECTION], (1,), ROME), METHODS["rome"](ed, (0, 1, 2, 3))
    passes = counted(EditScorer, "_together")
    ed.score(one)
    ed.score(many)
    (of_one, _), (of_many, _) = passes
    assert of_one <= of_many <= of_one + 1 <= 8, "the noise of Fact Forcing is one more"


@pytest.mark.gpu
def test_the_layers_of_other_edits_cost_nothing(counted):
    """Fine-tuned at eight layers, an edit each: in a step, rows are put together where edits join, once a layer."""
    model = gpt2(9, dtype=torch.float32).cuda()
    steps = counted(TrainingPass, "evaluate")
    editor(model).finetune([INJECTION, FORCING], range(8), 1, FINETUNE)
    asked = Counter()
    for (name, function), count in steps[0][1].items():
        asked[name] += count if function.startswith("engine.edit.runs.edited_runs.changed") else 0
    assert (asked["cat"], asked["add"]) == (8, 16)


@pytest.mark.gpu
def test_changes_are_narrowed_once_a_step(counted):
    model = gpt2(4, dtype=torch.bfloat16).cuda()
    steps, updates = counted(TrainingPass, "evaluate"), counted(Trained, "step")
    editor(model).finetune([INJECTION], (1,), 3, FINETUNE)
    functions = {function for _, operations in steps for name, function in operations if name == "_to_copy"}
    assert not any(using in function for function in functions for using in ("Dense", "_WeightProduct"))
    assert {operations["_to_copy", "engine.edit.deltas.delta.Dense.to"] for _, operations in updates} == {2}


@pytest.mark.gpu
def test_parameters_are_looked_at_without_a_wait_for_each():
    """Those that moments are checked with, and those that are refused where they are not finite."""
    model = gpt2(3)
    expected = Identity.of(read_architecture(model), range(3))
    model.cuda()
    assert strict(Identity.of)(read_architecture(model), range(3)) == expected
    strict(refuse_unfinite)(model)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4] = torch.nan
    with pytest.raises(ModelError, match=r"h\.1\.mlp\.c_fc\.weight holds NaN"):
        strict(refuse_unfinite)(model)
