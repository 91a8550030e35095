"""Scores of edited models are those of models whose weights are really changed, one prompt at a time."""

from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from helpers.compare import assert_table_close
from helpers.edited_models import dense, low_rank
from helpers.editing_cases import (
    END,
    ERASURE,
    EVERY_PROBLEM,
    FORCING,
    FULL,
    INJECTION,
    MIDDLE,
    ONE_TOKEN,
    START,
    THREE,
    request,
    task,
    unlifted,
    weight,
)
from helpers.families import EVERY_FAMILY, FAMILIES
from helpers.models import FACTS, tokenizer as byte_level
from oracles import scores as oracle_scores
from oracles.editing import Change, about_subject, down

import causalcone as cc
from causalcone.engine.edit.deltas.delta import Delta, Dense
from causalcone.engine.edit.methods.edits import edit_of
from causalcone.engine.edit.requests.requests import PROBLEMS, Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.scoring import evaluate
from causalcone.engine.edit.scoring.sampled_texts import essence_texts
from causalcone.engine.encoding import target_ids

TEXTS = ["Ann Lee is a golf of French", "Bo is"]
"""About a subject, or not."""
NAMES = {"rewrite": "efficacy", "paraphrase": "paraphrase", "neighborhood": "neighborhood"}
RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-3}
ABSOLUTE = {torch.float64: 1e-12, torch.float32: 1e-5}


def deltas(model, size=0.3):
    """By name: of one layer, the first and the last, and of several, with and without others between them."""
    last = model.config.num_hidden_layers - 1
    bias = down(model, 0).bias is not None
    return {
        "first": Delta({0: low_rank(model, 1, size=size)}),
        "last": Delta({last: low_rank(model, 3, seed=1, size=size)}),
        "dense": Delta({1: dense(model, seed=2, bias=bias, size=size / 3)}),
        "window": Delta({layer: dense(model, seed=layer, bias=False, size=size / 3) for layer in range(last + 1)}),
        "ends": Delta({0: low_rank(model, 2, seed=5, size=size), last: dense(model, seed=6, bias=bias, size=size / 3)}),
    }


def edit(request, delta, layer=0):
    return edit_of(request, "random", Window(layer, len(delta.layers), delta.layers), steps=1, loss=0.0, delta=delta)


def edits_of(requests, changes):
    return [edit(each, delta, layer) for each in requests for layer, delta in enumerate(changes.values())]


def changes(delta):
    """The same change for the plain scores."""
    return {
        layer: Change(weight(delta, layer), change.bias if isinstance(change, Dense) else None)
        for layer, change in delta.changes.items()
    }


@pytest.fixture
def essence(monkeypatch):
    """Essence texts of every fact, instead of sampled ones."""
    monkeypatch.setattr(evaluate, "essence_texts", lambda session, facts, seed: {fact.id: TEXTS for fact in facts})


def assert_exact(model, edits, tokenizer=None, texts=None, bounds=None):
    """Probes and metrics of all edits."""
    tokenizer = tokenizer or byte_level()
    relative, absolute = bounds or (RELATIVE[model.dtype], ABSOLUTE[model.dtype])
    scores = cc.Editor(model, tokenizer).evaluate(edits, essence=texts is not None, accuracy=True)
    assert [each.edit_id for each in scores.edits] == [each.edit_id for each in edits]
    probes, metrics = expected_rows(model, tokenizer, edits, texts)
    for found, expected in ((scores.probes.to_pylist(), probes), (scores.metrics.to_pylist(), metrics)):
        assert [named(row) for row in found] == [named(row) for row in expected]
        for name in [name for name in found[0] if name.startswith(("p_", "logp_", "answer_", "pre", "post"))]:
            left, right = (np.array([row[name] for row in rows], dtype=float) for rows in (found, expected))
            np.testing.assert_allclose(left, right, rtol=relative, atol=absolute, err_msg=name)
    return scores


def named(row):
    return tuple(row[name] for name in ("edit_id", "prompt_kind", "prompt_index", "metric") if name in row)


def expected_rows(model, tokenizer, edits, texts):
    """Probes and metrics, from the plain computation."""
    probes, metrics = [], []
    for each in edits:
        asked, change = task(each.request), changes(each.delta)
        read = oracle_scores.probe(model, tokenizer, asked, change)
        for probe in read:
            row = {"edit_id": each.edit_id, "prompt_kind": probe.kind, "prompt_index": probe.index}
            for name in ("pre", "post", "pre_other", "post_other"):
                reading = getattr(probe, name)
                row[f"p_{name}"] = None if reading is None else reading.p
                row[f"logp_{name}"] = None if reading is None else sum(reading.log_p)
                tokens = "answer_tokens_other" if name.endswith("other") else "answer_tokens"
                row[tokens] = None if reading is None else len(reading.log_p)
            probes.append(row)
        found = {}
        if texts is not None:
            found["perplexity"] = oracle_scores.essence_perplexities(model, tokenizer, asked, texts, change)
        for kind in NAMES:
            of_kind = [probe for probe in read if probe.kind == kind]
            found |= success(kind, of_kind, each.request.problem)
        for kind in NAMES:
            of_kind = [probe for probe in read if probe.kind == kind]
            if of_kind:
                found[f"{kind}_accuracy"] = tuple(
                    np.mean([getattr(probe, when).accuracy for probe in of_kind]) for when in ("pre", "post")
                )
        metrics += [
            {"edit_id": each.edit_id, "metric": name, "pre": pre, "post": post} for name, (pre, post) in found.items()
        ]
    return probes, metrics


def success(kind, probes, problem):
    """How often and by how much the new target is likelier than the true one; for neighbours the other way round."""
    trains_new = problem in ("error_injection", "tracing_reversal")
    differences = {
        when: [
            getattr(probe, when).geometric_mean - getattr(probe, f"{when}_other").geometric_mean
            for probe in probes
            if getattr(probe, f"{when}_other") is not None
        ]
        for when in ("pre", "post")
    }
    if not differences["pre"]:
        return {}
    sign = 1 if trains_new != (kind == "neighborhood") else -1
    return {
        f"{NAMES[kind]}_score": tuple(np.mean([sign * d > 0 for d in each]) for each in differences.values()),
        f"{NAMES[kind]}_magnitude": tuple(sign * np.mean(each) for each in differences.values()),
    }


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def family(request):
    return FAMILIES[request.param](3, 32, 4, dtype=torch.float64)


def test_every_architecture(family, essence):
    few = {name: delta for name, delta in deltas(family).items() if name in ("first", "ends")}
    edits = [edit(each, delta, layer) for layer, delta in enumerate(few.values()) for each in (INJECTION, FORCING)]
    scores = assert_exact(family, edits, texts=TEXTS)
    pre, post = (scores.probes[name].to_numpy() for name in ("p_pre", "p_post"))
    assert (abs(np.log(post / pre)) > 1e-3).mean() > 0.7


def test_the_unmodified_float64_model(family):
    with unlifted():
        assert_exact(family, [edit(FORCING, deltas(family)["ends"])], bounds=(1e-4, 5e-6))


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_float32(name):
    model = FAMILIES[name](3, 32, 4, dtype=torch.float32)
    assert_exact(model, [edit(FORCING, deltas(model)["ends"]), edit(INJECTION, deltas(model)["dense"])])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_problem(model, essence, problem):
    requests = [request(fact, problem) for fact in FULL]
    assert_exact(model, edits_of(requests, {"ends": deltas(model)["ends"]}), texts=TEXTS)


@pytest.mark.parametrize("name", ["first", "last", "dense", "window", "ends"])
def test_every_change(model, essence, name):
    assert_exact(model, [edit(each, deltas(model)[name]) for each in THREE], texts=TEXTS)


def test_all_together(model):
    """Edits that join the pass at different layers, of requests in any order."""
    edits = edits_of(EVERY_PROBLEM, deltas(model))
    assert_exact(model, edits[::3] + edits[1::3] + edits[2::3])


def test_edits_that_were_made(model):
    editor = cc.Editor(model, byte_level())
    edits = editor.finetune(THREE, (0, 3), 3, cc.FinetuneHparams(steps=3, lr=1e-2, norm_constraint=1e-2))
    scores = assert_exact(model, [each for each in edits if each.delta_norm])
    table = editor.score(edits).to_pylist()
    assert len(table) == 6 * 6
    rewrites = {row["edit_id"]: row for row in scores.probes.to_pylist() if row["prompt_kind"] == "rewrite"}
    assert all(row["p_post"] > row["p_pre"] for row in rewrites.values())


def test_neighbours_with_an_answer_of_their_own(model):
    """Their accuracy is that of this answer, here what the model says; their probabilities are the targets'."""
    text, answer = next(filter(None, (own_answer(model, f"{fact.text}{more}") for fact in FULL for more in ENDS)))
    fact = replace(START, neighborhood_prompts=(text, "Rome is"), neighborhood_target=answer)
    delta = deltas(model)["window"]
    found, plain = (
        cc.Editor(model, byte_level()).evaluate([edit(request(each), delta)], accuracy=True)
        for each in (fact, replace(fact, neighborhood_target=None))
    )
    for name in ("p_pre", "p_post", "p_pre_other", "p_post_other"):
        np.testing.assert_allclose(found.probes[name], plain.probes[name], rtol=1e-9)
    own = [
        probe
        for probe in oracle_scores.probe(
            model, byte_level(), task(request(replace(fact, target_true=answer), "fact_amplification")), changes(delta)
        )
        if probe.kind == "neighborhood"
    ]
    (row,) = (row for row in found.metrics.to_pylist() if row["metric"] == "neighborhood_accuracy")
    assert row["pre"] == np.mean([probe.pre.accuracy for probe in own]) > 0
    assert row["post"] == np.mean([probe.post.accuracy for probe in own])


ENDS = ("", " the", " is", " a", " golf", " tennis", " in", " of")


def own_answer(model, text):
    """The text with what the model says after it, where this is a word that stands alone."""
    with torch.no_grad():
        said = int(model(torch.tensor([byte_level()(text)["input_ids"]])).logits[0, -1].argmax())
    word = byte_level().decode([said])
    return (text, word) if word.strip() and target_ids(word, byte_level()) == (said,) else None


def test_accuracies_are_not_all_zero(model):
    """Of answers that the model gives: the target's tokens are the likeliest before, and not after."""
    answer = []
    prompt = about_subject(model, byte_level(), ONE_TOKEN, ONE_TOKEN.prompt).ids
    for _ in range(3):
        logits = model(torch.tensor([prompt + answer])).logits[0, -1]
        answer.append(int(logits.argmax()))
    asked = Request(ONE_TOKEN, "fact_erasure", tuple(answer), target_ids("golf", byte_level()))
    fact = replace(ONE_TOKEN, target_new="golf")
    scores = assert_exact(model, [edit(replace(asked, fact=fact), deltas(model)["window"])])
    rows = {row["metric"]: row for row in scores.metrics.to_pylist()}
    assert rows["rewrite_accuracy"]["pre"] == 1.0
    assert rows["rewrite_accuracy"]["post"] < 1.0


@pytest.mark.parametrize(
    ("true", "new"),
    [("golf", "golf tennis"), ("golf tennis in Seattle", "golf"), ("golf in Seattle", "golf tennis"), ("golf", "golf")],
    ids=["other longer", "target longer", "one beginning", "the same"],
)
def test_targets_that_begin_alike(model, true, new):
    fact = replace(MIDDLE, target_true=true, target_new=new)
    assert_exact(model, edits_of([request(fact, "fact_erasure"), request(fact)], {"dense": deltas(model)["dense"]}))


@pytest.mark.parametrize("problem", ["fact_erasure", "fact_forcing"])
def test_without_another_target(model, problem):
    fact = replace(END, target_new=None)
    asked = Request(fact, problem, target_ids("golf", byte_level()), None, 0.3 if problem == "fact_forcing" else None)
    scores = assert_exact(model, [edit(asked, deltas(model)["first"])])
    assert scores.probes["p_pre_other"].null_count == scores.probes["p_post_other"].null_count == 6
    assert {row["metric"] for row in scores.metrics.to_pylist()} == {f"{kind}_accuracy" for kind in NAMES}


def test_facts_without_evaluation_prompts(model):
    bare = replace(FACTS[0], target_new="golf")
    scores = assert_exact(model, [edit(request(each), deltas(model)["first"]) for each in (bare, MIDDLE)])
    kinds = [row["prompt_kind"] for row in scores.probes.to_pylist() if row["edit_id"].startswith("start/")]
    assert kinds == ["rewrite"]
    assert {row["metric"] for row in scores.metrics.to_pylist() if row["edit_id"].startswith("start/")} == {
        "efficacy_score",
        "efficacy_magnitude",
        "rewrite_accuracy",
    }


def test_noise_is_where_the_subject_first_is(model, essence):
    """In prompts that hold it twice, inside a word, at the end, or not at all."""
    fact = replace(
        ONE_TOKEN,
        paraphrase_prompts=("Rome and Rome are", "They say Romeo is", "Tennis is played in Rome"),
        neighborhood_prompts=("Rome", "rome is"),
        attribute_prompts=("The Space Needle",),
    )
    edits = [edit(request(fact, "fact_forcing", sigma), deltas(model)["ends"]) for sigma in (0.3, 2.0)]
    weak, strong = (assert_exact(model, [each], texts=TEXTS).probes.to_pylist() for each in edits)
    changed = [a["p_pre"] != b["p_pre"] for a, b in zip(weak, strong, strict=True)]
    assert changed == [True, True, True, True, True, False, False]


@pytest.mark.parametrize("problem", ["error_injection", "fact_forcing"])
def test_special_tokens(model, essence, problem):
    """They are part of prompts and of essence texts, where they count."""
    assert_exact(model, [edit(request(START, problem), deltas(model)["ends"])], byte_level(bos=True), TEXTS)


def test_essence_texts_that_are_sampled(model):
    """Five of the unedited model, the same before and after, by whatever edit."""
    editor = cc.Editor(model, byte_level(), seed=3)
    edits = [edit(each, deltas(model, 0.1)["ends"]) for each in (INJECTION, FORCING)]
    rows = [row for row in editor.evaluate(edits, essence=True).metrics.to_pylist() if row["metric"] == "perplexity"]
    for row, each in zip(rows, edits, strict=True):
        texts = essence_texts(editor.session, [each.request.fact], 3)[each.fact_id]
        assert len(set(texts)) == 5
        expected = oracle_scores.essence_perplexities(
            model, byte_level(), task(each.request), texts, changes(each.delta)
        )
        assert (row["pre"], row["post"]) == pytest.approx(expected, rel=1e-9)


def test_failed_edits_have_no_probabilities_after(model):
    """Beside others, whose rows are as without them."""
    good = edit(ERASURE, deltas(model)["dense"])
    bad = edit_of(
        ERASURE, "random", Window(2, 1, (2,)), steps=0, loss=float("nan"), reason="the loss is nan after 0 steps"
    )
    editor = cc.Editor(model, byte_level())
    scores = editor.evaluate([bad, good, replace(bad, request=INJECTION)], accuracy=True)
    alone = editor.evaluate([good], accuracy=True)
    for table, own in ((scores.probes, alone.probes), (scores.metrics, alone.metrics)):
        rows = table.to_pylist()
        assert_table_close(table.filter(pc.field("edit_id") == good.edit_id), own)
        after = [name for name in table.schema.names if "post" in name]
        others = [row for row in rows if row["edit_id"] != good.edit_id]
        assert others
        assert all(row[name] is None for row in others for name in after)
    assert [each.status for each in scores.edits] == ["failed", "done", "failed"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_on_a_gpu(name, dtype, essence):
    model = FAMILIES[name](3, 32, 4, dtype=dtype)
    edits = edits_of(THREE, deltas(model))
    on_cpu = cc.Editor(model, byte_level()).evaluate(edits, essence=True, accuracy=True)
    on_gpu = cc.Editor(model.cuda(), byte_level()).evaluate(edits, essence=True, accuracy=True)
    for found, expected in ((on_gpu.probes, on_cpu.probes), (on_gpu.metrics, on_cpu.metrics)):
        for name in [name for name in found.schema.names if name.startswith(("p_pre", "p_post", "pre", "post"))]:
            np.testing.assert_allclose(
                found[name].to_numpy(zero_copy_only=False), expected[name].to_numpy(zero_copy_only=False),
                rtol=RELATIVE[dtype], atol=ABSOLUTE[dtype],
            )  # fmt: skip
