"""``Editor``: the same results again, the model that it sees, requests, and scores of what it made."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.compare import assert_table_close
from helpers.edited_models import dense, low_rank
from helpers.editing_cases import (
    CONTEXTS,
    END,
    EVERY_PROBLEM,
    FINETUNE,
    FORCING,
    FULL,
    INJECTION,
    MEMIT,
    METHODS,
    ROME,
    START,
    THREE,
    editor,
    error,
    random_moments,
    request,
    study,
    weight,
)
from helpers.generated import generate_texts
from helpers.models import gpt2
from oracles import requests as oracle_requests, scores as oracle_scores
from oracles.editing import down_weight

import causalcone as cc
from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.requests.problems import FilteredFacts
from causalcone.engine.edit.requests.requests import PROBLEMS
from causalcone.engine.edit.scoring.generation_metrics import generation_entropy
from causalcone.engine.edit.texts.contexts import Contexts
from causalcone.engine.encoding import PromptWarning
from causalcone.engine.errors import ExperimentError, FactError
from causalcone.engine.schemas import METRIC_SCHEMA, PROBE_SCHEMA

ANSWERS = {"start": "CALLE call", "end": " hej", "one token": "hehe", "many tokens": "Calle"}
"""What the model says after the prompts of some facts, in whichever case."""


# --- the same again ---


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_numbers(model, tokenizer, moments, method):
    """On a fresh editor and on a used one."""
    one, other = (cc.Editor(model, tokenizer, moments, sigma=0.3, seed=5) for _ in range(2))
    results = [study(ed, method) for ed in (one, other, one)]
    for edits, scores in results[1:]:
        assert_table_close(scores.probes, results[0][1].probes)
        assert_table_close(scores.metrics, results[0][1].metrics)
        for edit, expected in zip(edits, results[0][0], strict=True):
            assert (edit.edit_id, edit.steps) == (expected.edit_id, expected.steps)
            assert edit.loss == pytest.approx(expected.loss, rel=1e-9)
            for layer in expected.delta.layers:
                assert error(weight(edit.delta, layer), weight(expected.delta, layer)) < 1e-9


def test_contexts_are_sampled_once(model, tokenizer, moments):
    """With the seed, from the unedited model; each method has its own."""
    ed = cc.Editor(model, tokenizer, moments, seed=1)
    first = ed.contexts
    assert (len(first.rome), len(first.memit)) == (20, 5)
    with cc.applied(model, Delta({1: low_rank(model, 3, size=1.0)})):
        assert ed.contexts is first
    assert cc.Editor(model, tokenizer, seed=1).contexts == first
    assert cc.Editor(model, tokenizer, seed=2).contexts != first
    for method, texts in (("rome", first.rome), ("memit", first.memit)):
        (found,) = METHODS[method](ed, [INJECTION])
        (expected,) = METHODS[method](editor(model, moments, texts), [INJECTION])
        assert found.loss == expected.loss
    own = cc.Editor(model, tokenizer, moments, Contexts(rome=CONTEXTS[:1], memit=CONTEXTS[1:]))
    for method, texts in (("rome", CONTEXTS[:1]), ("memit", CONTEXTS[1:])):
        (found,) = METHODS[method](own, [INJECTION])
        (expected,) = METHODS[method](editor(model, moments, texts), [INJECTION])
        assert found.loss == expected.loss


def test_from_a_folder(folder):
    ed = cc.Editor.from_pretrained(str(folder / "model"), contexts=CONTEXTS, dtype="float64", seed=1)
    single = gpt2(dtype=torch.float32).double()
    (found,), (expected,) = (METHODS["finetune"](each, [INJECTION]) for each in (ed, editor(single)))
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)


def test_computing_in_another_dtype(model):
    """A float32 model's edits in float64 are those of the same model in float64."""
    single = gpt2(dtype=torch.float32)
    moments = random_moments(single)
    for make in METHODS.values():
        found = make(editor(single, moments, dtype="float64"), THREE)
        expected = make(editor(copy.deepcopy(single).double(), moments), THREE)
        for one, other in zip(found, expected, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-12)
            for layer in other.delta.layers:
                assert error(weight(one.delta, layer), weight(other.delta, layer), 1e-5) < 1e-9


def test_half_precision(model):
    """Roughly the same, with changes of weights in float32."""
    moments = random_moments(model)
    for make in METHODS.values():
        exact = make(editor(model, moments), [INJECTION, FORCING], (0,))
        for edit, right in zip(
            make(editor(model, moments, dtype="bfloat16"), [INJECTION, FORCING], (0,)), exact, strict=True
        ):
            assert edit.loss == pytest.approx(right.loss, rel=0.05)
            assert {part.dtype for change in edit.delta.changes.values() for part in vars(change).values()} == {
                torch.float32
            }


# --- which model is seen ---


@pytest.mark.parametrize("method", METHODS)
def test_inside_an_applied_edit(tokenizer, method):
    """The edited model is edited, and scored; outside, the unedited one again."""
    model = gpt2(3)
    moments, delta = random_moments(model), Delta({0: dense(model, size=0.05), 1: low_rank(model, 2, size=1.0)})
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in delta.layers:
            down_weight(twin, layer).add_(weight(delta, layer))
        twin.transformer.h[0].mlp.c_proj.bias.add_(delta.changes[0].bias)
    ed = editor(model, moments)
    plain = METHODS[method](ed, THREE)
    with cc.applied(model, delta):
        found = METHODS[method](ed, THREE)
        probes = ed.score(found)
    expected = METHODS[method](editor(twin, moments), THREE)
    for one, other in zip(found, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-10)
        for layer in other.delta.layers:
            assert error(weight(one.delta, layer), weight(other.delta, layer), 1e-5) < 1e-9
    for name in ("p_pre", "p_post"):
        np.testing.assert_allclose(probes[name], editor(twin, moments).score(expected)[name], rtol=1e-9)
    assert found[0].loss != pytest.approx(plain[0].loss, rel=1e-3)
    assert [edit.loss for edit in METHODS[method](ed, THREE)] == [edit.loss for edit in plain]


def test_moments_of_an_edited_model(model, collected):
    """The keys of layers behind an edit are others: moments of the unedited model are none of theirs."""
    ed = editor(model, collected)
    with cc.applied(model, Delta({1: low_rank(model, 2)})):
        assert METHODS["rome"](ed, [INJECTION], (1,))[0].status == "done"
        with pytest.raises(ExperimentError, match="moments are of another model"):
            METHODS["rome"](ed, [INJECTION], (2,))
        with pytest.raises(ExperimentError, match="moments are of another model"):
            METHODS["memit"](ed, [INJECTION], (1,))
        assert METHODS["finetune"](ed, [INJECTION], (2,))[0].status == "done"
    assert METHODS["rome"](ed, [INJECTION], (2,))[0].status == "done"


def test_applied_edits_give_the_scores(model, moments):
    """What scoring says of an edit is what the model says with it applied, and what it says without is the same."""
    ed = editor(model, moments)
    for make in METHODS.values():
        edits = make(ed, [INJECTION, FORCING])
        for edit in edits:
            rows = ed.score([edit]).to_pylist()
            with cc.applied(model, edit.delta):
                inside = ed.score([edit]).to_pylist()
            for row, own in zip(rows, inside, strict=True):
                assert own["p_pre"] == pytest.approx(row["p_post"], rel=1e-9)


# --- requests ---


@pytest.mark.parametrize("problem", PROBLEMS)
def test_requests(model, tokenizer, problem):
    """Of the facts that suit the problem, with the targets that it trains towards, at the level of the noise."""
    facts = [replace(fact, target_true=ANSWERS.get(fact.id, fact.target_true)) for fact in FULL[::2]]
    facts[2] = replace(facts[2], target_true="Latin")
    ed = cc.Editor(model, tokenizer, sigma=0.7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = ed.requests(facts, problem)
    suited = [fact for fact in facts if oracle_requests.suits(model, tokenizer, fact, problem)]
    assert [each.fact for each in found] == suited
    assert 0 < len(suited) < len(facts) or problem == "fact_erasure"
    assert {type(each.message) for each in caught} == {FilteredFacts, PromptWarning}  # a subject is the first token
    for each in found:
        expected = oracle_requests.request(model, tokenizer, each.fact, problem, 0.7)
        assert each.target == expected.target
        assert each.other == oracle_scores.other_target(tokenizer, expected)
        assert each.sigma == (0.7 if problem == "fact_forcing" else None)


def test_an_erased_fact_is_one_that_is_known(model, tokenizer):
    """p of its answer is at least 0.02."""
    known = []
    for fact in FULL[::2]:
        said = oracle_requests.greedy(model, tokenizer(fact.text)["input_ids"], 1)
        word = tokenizer.decode(said)
        if word.strip():
            known.append(replace(fact, id=f"{fact.id} known", target_true=word))
    facts = [replace(END, target_true=" hej"), *known]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cc.Editor(model, tokenizer).requests(facts, "fact_erasure")
    assert [each.fact for each in found] == [
        fact for fact in facts if oracle_requests.suits(model, tokenizer, fact, "fact_erasure")
    ]


@pytest.mark.parametrize("problem", ["tracing_reversal", "fact_forcing"])
def test_noise_in_standard_deviations(model, tokenizer, problem):
    """Of the subjects of all facts that are given."""
    level = cc.Tracer(model, tokenizer).noise_level(FULL, "2sd")
    ed = cc.Editor(model, tokenizer, sigma="2sd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ed.requests(FULL, problem, filtered=False, on_error="skip")
        expected = cc.Editor(model, tokenizer, sigma=level).requests(FULL, problem, filtered=False, on_error="skip")
    assert found == expected != []


def test_a_target_that_is_the_answer_already(model, tokenizer):
    fact = replace(START, target_new=START.target_true)
    with pytest.raises(FactError, match="'start': target_new 'tennis' is the same answer as target_true"):
        cc.Editor(model, tokenizer).requests([fact], "error_injection", filtered=False)


# --- run, score, evaluate ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory", [None, "6MB"])
def test_run_is_edits_and_scores(model, moments, method, memory):
    """Batch by batch."""
    hparams = {"rome": ROME, "memit": MEMIT, "finetune": FINETUNE}[method]
    window = None if method == "rome" else 3
    ed = editor(model, moments, memory=memory)
    ran = list(ed.run(EVERY_PROBLEM, method, (0, 2), window, hparams))
    edits = METHODS[method](ed, EVERY_PROBLEM, (0, 2))
    assert [edit.edit_id for edit, _ in ran] == [edit.edit_id for edit in edits]
    for (edit, _), expected in zip(ran, edits, strict=True):
        assert (edit.loss, edit.steps, edit.status) == (expected.loss, expected.steps, expected.status)
    found = [row for _, rows in ran for row in rows.to_pylist()]
    table = ed.score(edits).to_pylist()
    assert [row["edit_id"] for row in found] == [row["edit_id"] for row in table]
    for name in ("p_pre", "p_post", "p_pre_other", "p_post_other"):
        np.testing.assert_allclose([row[name] for row in found], [row[name] for row in table], rtol=1e-9)


def test_no_requests(model, moments):
    ed = editor(model, moments)
    for method, make in METHODS.items():
        assert make(ed, []) == []
        assert list(ed.run([], method, (1,))) == []
        assert list(ed.batches([], method, (1,))) == []
    assert ed.requests([], "fact_erasure") == []
    assert ed.score([]).schema == PROBE_SCHEMA
    scores = ed.evaluate([], essence=True, accuracy=True, generation=True)
    assert (scores.edits, scores.probes.num_rows, scores.metrics.num_rows) == ([], 0, 0)
    assert scores.metrics.schema == METRIC_SCHEMA
    with pytest.raises(ExperimentError, match="no requests"):
        ed.memit_joint([], (1,))


def test_what_edited_models_write(model, moments):
    """Its entropy, in the unedited model and with each edit applied."""
    fact = replace(START, generation_prompts=("Ann Lee was seen", "They like"))
    ed = editor(model, moments, seed=4)
    edits = METHODS["rome"](ed, [request(fact), FORCING])
    rows = ed.evaluate(edits, generation=True).metrics.to_pylist()
    (row,) = (row for row in rows if row["metric"] == "generation_entropy")
    (before,) = generate_texts(ed.session, [edits[0].request], 4)
    with cc.applied(model, edits[0].delta):
        (after,) = generate_texts(ed.session, [edits[0].request], 4)
    assert after != before
    assert row["edit_id"] == edits[0].edit_id
    assert row["pre"] == pytest.approx(generation_entropy(before))
    assert row["post"] == pytest.approx(generation_entropy(after))
