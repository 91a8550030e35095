"""UltraEdit gives the plain edits, turn after turn, on any projection; its statistics survive a file."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.editing_cases import AMPLIFICATION, ERASURE, INJECTION, MANY_TOKENS, REVERSAL, error, request, task
from helpers.families import FAMILIES
from helpers.models import gpt2, tokenizer
from oracles.ultraedit import UltraEdit

import causalcone as cc
from causalcone.engine.edit.deltas.delta import layer_and_projection
from causalcone.engine.edit.methods.ultraedit import UltraEditHparams
from causalcone.engine.errors import ExperimentError, ModelError

REQUESTS = [INJECTION, REVERSAL, ERASURE, request(MANY_TOKENS), AMPLIFICATION, replace(INJECTION)]
HPARAMS = UltraEditHparams(lr=1e-2, ridge=0.5, minibatch=2)
MODULES = {"gpt2": ("down", "up"), "llama": ("down", "gate_up", "gate", "up"), "gptj": ("down", "up")}


def sequence(model, layers=((1, 2),), batch=3, **changes):
    return cc.Editor(model, tokenizer()).sequence(
        REQUESTS, "ultraedit", layers, hparams=replace(HPARAMS, **changes), batch=batch
    )


def assert_exact(model, layers, modules, batch, bounds=1e-8):
    written = copy.deepcopy(model)
    places = [(layer, name) for layer in layers for name in modules.split("_")]
    plain = UltraEdit(written, tokenizer(), places, HPARAMS.lr, HPARAMS.ridge, HPARAMS.minibatch)
    edits = sequence(model, (layers,), batch, modules=modules)
    for number, made in enumerate(edits):
        expected = plain.turn([task(each) for each in edits.of_batch(number)])
        found = {layer_and_projection(place): change for place, change in made.delta.changes.items()}
        assert {edit.reason for edit in made.edits} == {None}
        assert found.keys() == expected.keys()
        for place, change in found.items():
            assert expected[place].norm() > 1e-4
            assert error(change.rows(slice(None)), expected[place]) < bounds, (number, place)


@pytest.mark.parametrize(("family", "modules"), [(name, each) for name, of in MODULES.items() for each in of])
def test_three_turns_of_three_families(family, modules):
    assert_exact(FAMILIES[family](3, 32, 4), (0, 1), modules, 2)


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("modules", ["down", "gate_up"])
def test_windows(layers, modules):
    """Also those with the last layer, and a batch that is not full."""
    assert_exact(FAMILIES["llama"](3, 32, 4), layers, modules, 4)


def test_float32():
    assert_exact(FAMILIES["llama"](3, 32, 4, dtype=torch.float32), (1, 2), "gate_up", 3, 1e-5)


def test_passes_of_any_size_make_the_same_turn(monkeypatch):
    from causalcone.engine.edit.methods.batching import Batching

    whole = sequence(gpt2(3))
    monkeypatch.setattr(Batching, "of_items", lambda self, items, *_: [[item] for item in items])
    for one, other in zip(whole, sequence(gpt2(3)), strict=True):
        for place, change in one.delta.changes.items():
            assert error(other.delta.changes[place].rows(slice(None)), change.rows(slice(None))) < 1e-10


def test_all_requests_of_a_window_share_a_change():
    editor = cc.Editor(gpt2(3), tokenizer())
    first, second = editor.batches(REQUESTS[:2], "ultraedit", ((0, 1), (2,)), hparams=HPARAMS)
    assert [len({id(edit.delta) for edit in edits}) for edits in (first, second)] == [1, 1]
    assert [list(edits[0].delta.changes) for edits in (first, second)] == [[0, 1], [2]]
    (alone,) = editor.batches(REQUESTS[:2], "ultraedit", ((2,),), hparams=HPARAMS)  # a window knows nothing of another
    assert alone[0].delta_norm == second[0].delta_norm


def test_statistics_go_on_after_a_file(tmp_path):
    model = FAMILIES["llama"](3, 32, 4)
    through, resumed = sequence(model, modules="gate_up", batch=2), sequence(model, modules="gate_up", batch=2)
    for number, made in enumerate(through):
        made.save(tmp_path / f"{number}.safetensors")
        if number < 2:
            assert resumed.restore(tmp_path / f"{number}.safetensors").state.keys() == made.state.keys()
        else:
            again = next(resumed)
            for place, change in made.delta.changes.items():
                assert torch.equal(again.delta.changes[place].left, change.left)
    fresh = sequence(model, modules="gate_up", batch=2)
    assert next(fresh).delta.norm != made.delta.norm


def test_broken_requests_leave_the_others():
    noisy = replace(INJECTION, problem="fact_forcing", sigma=float("inf"))
    edits = cc.Editor(gpt2(3), tokenizer()).batches([noisy, REVERSAL, ERASURE], "ultraedit", [(1,)], hparams=HPARAMS)
    first, *others = next(edits)
    assert "the loss, nan," in first.reason
    assert [edit.status for edit in others] == ["done", "done"]


def test_one_token_has_nothing_to_be_normalised_by():
    one = replace(AMPLIFICATION, target=AMPLIFICATION.target[:1])
    ((edit,),) = cc.Editor(gpt2(3), tokenizer()).batches([one], "ultraedit", [(1,)], hparams=HPARAMS)
    assert "edit more requests together" in edit.reason


def test_what_cannot_be_is_refused():
    with pytest.raises(ExperimentError, match="ridge is 0; give a number above zero"):
        UltraEditHparams(ridge=0.0)
    with pytest.raises(ExperimentError, match="modules is 'attn'"):
        UltraEditHparams(modules="attn")
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no gate-projection that can be edited; it has down, up"):
        next(sequence(gpt2(3), modules="gate_up"))
