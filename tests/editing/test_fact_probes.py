"""A fact's own probes and free answers, compared with models whose weights are really changed, one prompt at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.edited_models import dense, down, low_rank
from helpers.editing_cases import END, FULL, MIDDLE, START, request
from helpers.families import FAMILIES, quick_first
from helpers.models import tokenizer as byte_level
from oracles import answers as oracle
from oracles.editing import about_subject, noising
from oracles.requests import greedy
from oracles.scores import in_text

import causalcone as cc
from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.methods.edits import edit_of
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.scoring import answers
from causalcone.engine.encoding import target_ids
from causalcone.engine.errors import FactError

GROUPS = ("portability/Reasoning", "locality/Forgetfulness")
PROBES = (
    cc.FactProbe(GROUPS[0], "They say that Bo speaks", ("French", "Latin", "golf tennis"), "language"),
    cc.FactProbe(GROUPS[1], "Rome is in", ("Seattle", "the city")),
    cc.FactProbe(GROUPS[0], "Ann Lee is known to be", ("sporty",)),
)
QUICK = ("gpt2", "gemma2", "llama")


def edits_of(model, *requests, size=0.4):
    bias = down(model, 0).bias is not None
    both = Delta({0: low_rank(model, 2, size=size), 2: dense(model, bias=bias, size=size / 3)})
    changes = (both, Delta({1: low_rank(model, 1, seed=4)}))
    return [
        edit_of(each, "random", Window(layer, 1, ()), steps=1, loss=0.0, delta=delta)
        for each in requests
        for layer, delta in enumerate(changes)
    ]


def prompts(model, fact):
    """The prompts that are answered: by kind and number."""
    rows = {("rewrite", 0): (fact.text, about_subject(model, byte_level(), fact, fact.prompt))}
    for n, text in enumerate(fact.paraphrase_prompts):
        rows["paraphrase", n] = text, in_text(byte_level(), text, fact.subject)
    for probe in fact.probes:
        n = sum(kind == probe.group for kind, _ in rows)
        rows[probe.group, n] = probe.prompt, in_text(byte_level(), probe.prompt, fact.subject)
    return rows


def metrics_of(scores, edit):
    return {
        row["metric"]: (row["pre"], row["post"]) for row in scores.metrics.to_pylist() if row["edit_id"] == edit.edit_id
    }


@pytest.fixture(scope="module", params=quick_first(FAMILIES, QUICK))
def family(request):
    return FAMILIES[request.param](3, 32, 4, dtype=torch.float64, positions=160)  # answers of any bytes fit


def test_free_answers_are_those_of_generate_in_changed_models(family):
    """The edited model's answer is made an accepted one, so that some match."""
    fact = replace(START, probes=PROBES)
    (first, *_) = edits_of(family, request(fact))
    with cc.applied(family, first.delta):
        said = {key: oracle.answer(family, byte_level(), prompt) for key, (_, prompt) in prompts(family, fact).items()}
    probes = (replace(PROBES[0], answers=("no", f"The {said[GROUPS[0], 0].rstrip('.')}!")), *PROBES[1:])
    fact = replace(fact, probes=probes, target_new_aliases=(said["rewrite", 0].upper(), "no"))
    edits = [*edits_of(family, request(fact)), *edits_of(family, request(END, "fact_erasure"))[:1]]
    scores = cc.Editor(family, byte_level()).evaluate(edits, answers=True)
    texts = {(row.pop("edit_id"), row["prompt_kind"], row["prompt_index"]): row for row in scores.texts.to_pylist()}
    assert len(texts) == 2 * (3 + 3) + 3
    said = {}
    for edit in edits:
        own, found = edit.request.fact, {}
        for (kind, n), (text, prompt) in prompts(family, own).items():
            before = said[text] = said.get(text) or oracle.answer(family, byte_level(), prompt)
            with cc.applied(family, edit.delta):
                after = oracle.answer(family, byte_level(), prompt)
            row = texts[edit.edit_id, kind, n]
            assert (row["prompt"], row["before"], row["after"]) == (text, before, after)
            accepted = (own.target_new, *own.target_new_aliases) if own.id == fact.id else (own.target_true,)
            if kind in GROUPS:
                accepted = [probe for probe in own.probes if probe.group == kind][n].answers
            found.setdefault(kind, []).append([oracle.exact_match(each, accepted) for each in (before, after)])
        matches = {f"{kind}_exact_match": tuple(np.mean(rows, axis=0)) for kind, rows in found.items()}
        assert matches == {k: v for k, v in metrics_of(scores, edit).items() if k.endswith("exact_match")}
    rewritten = metrics_of(scores, edits[0])
    assert rewritten["rewrite_exact_match"][1] == 1.0
    assert rewritten[f"{GROUPS[0]}_exact_match"][1] == 0.5


def test_probes_are_those_of_changed_models(family):
    """The likeliest accepted answer, and shares of its tokens that are likeliest, or of likeliest tokens that stay."""
    fact = replace(MIDDLE, probes=PROBES)
    edits = edits_of(family, request(fact), request(END))
    scores = cc.Editor(family, byte_level()).evaluate(edits, accuracy=True)
    rows = {(row["edit_id"], row["prompt_kind"], row["prompt_index"]): row for row in scores.probes.to_pylist()}
    for edit in edits[:2]:
        shares = {group: [] for group in GROUPS}
        for (kind, n), (_, prompt) in prompts(family, fact).items():
            if kind not in GROUPS:
                continue
            probe = [probe for probe in PROBES if probe.group == kind][n]
            ids = [target_ids(answer, byte_level()) for answer in probe.answers]
            before = [oracle.likeliest(family, prompt, each) for each in ids]
            with cc.applied(family, edit.delta):
                after = [oracle.likeliest(family, prompt, each) for each in ids]
            row = rows[edit.edit_id, kind, n]
            expected = [np.exp(max(log_p for log_p, _ in read)) for read in (before, after)]
            assert [row["p_pre"], row["p_post"]] == pytest.approx(expected, rel=1e-9)
            assert (row["p_pre_other"], row["prompt_name"], row["condition"]) == (None, probe.name or None, None)
            if kind.startswith("locality"):
                best = max(range(len(ids)), key=lambda i: before[i][0])
                shares[kind].append((1.0, np.mean(np.equal(before[best][1], after[best][1]))))
            else:
                shares[kind].append(tuple(best_share(ids, read) for read in (before, after)))
        found = metrics_of(scores, edit)
        for group in GROUPS:
            assert found[f"{group}_accuracy"] == pytest.approx(tuple(np.mean(shares[group], axis=0)))
    plain = [name for name in metrics_of(scores, edits[2]) if "/" in name]
    assert (plain, len(rows)) == ([], 2 * (6 + 3) + 2 * 6)


def best_share(ids, read):
    return max(np.mean(np.equal(said, each)) for each, (_, said) in zip(ids, read, strict=True))


def test_other_rows_are_as_without_probes(model):
    plain, probed = (
        cc.Editor(model, byte_level()).evaluate(edits_of(model, request(fact)), accuracy=True)
        for fact in (START, replace(START, probes=PROBES))
    )
    kept = [row for row in probed.probes.to_pylist() if row["prompt_kind"] not in GROUPS]
    for row, other in zip(kept, plain.probes.to_pylist(), strict=True):
        assert row == {k: pytest.approx(v) if isinstance(v, float) else v for k, v in other.items()}
    found = [row for row in probed.metrics.to_pylist() if "/" not in row["metric"]]
    assert [row["metric"] for row in found] == [row["metric"] for row in plain.metrics.to_pylist()]


def test_conditions_are_of_what_the_unedited_model_says(model):
    """A probe whose condition does not hold has its row, and counts nowhere."""
    prompt = "They say"
    said = oracle.answer(model, byte_level(), in_text(byte_level(), prompt, "Ann Lee"))
    yes, no = cc.ProbeCondition(prompt, ("nothing", said)), cc.ProbeCondition(prompt, ("xyzzy",))
    cases = [
        ((yes,), False, True),
        ((no,), False, False),
        ((yes, no), False, True),
        ((yes, no), True, False),
        ((), True, None),
    ]
    probes = [replace(PROBES[0], conditions=each, every=every) for each, every, _ in cases]
    probes.append(replace(PROBES[1], conditions=(no,)))
    fact = replace(START, probes=tuple(probes))
    edits = edits_of(model, request(fact))
    editor = cc.Editor(model, byte_level())
    scores = editor.evaluate(edits, accuracy=True, answers=True)
    rows = [
        row for row in scores.probes.to_pylist() if row["edit_id"] == edits[1].edit_id and row["prompt_kind"] in GROUPS
    ]
    assert [row["condition"] for row in rows] == [*(held for *_, held in cases), False]
    assert all(row["p_pre"] > 0 for row in rows)
    found = metrics_of(scores, edits[1])
    assert {name for name in found if "/" in name} == {f"{GROUPS[0]}_accuracy", f"{GROUPS[0]}_exact_match"}
    counted = replace(fact, probes=(PROBES[0],))
    alone = metrics_of(editor.evaluate(edits_of(model, request(counted)), accuracy=True, answers=True), edits[1])
    for name in (name for name in found if "/" in name):
        assert found[name] == pytest.approx(alone[name])
    with cc.applied(model, edits[0].delta):
        again = editor.evaluate(edits_of(model, request(fact)))
        now = oracle.answer(model, byte_level(), in_text(byte_level(), prompt, "Ann Lee"))
    assert now != said
    conditions = {row["condition"] for row in again.probes.to_pylist() if row["prompt_kind"] in GROUPS}
    assert conditions == {False, None}


def test_noise_is_on_the_subject_where_models_answer(model):
    asked = request(replace(START, probes=PROBES), "fact_forcing", 1.5)
    edits = edits_of(model, asked)
    texts = cc.Editor(model, byte_level()).evaluate(edits, answers=True).texts.to_pylist()
    for (kind, n), (_, prompt) in prompts(model, asked.fact).items():
        ids = greedy(model, prompt.ids, oracle.TOKENS, noising(model, prompt, 1.5))
        (row,) = (each for each in texts[: len(texts) // 2] if (each["prompt_kind"], each["prompt_index"]) == (kind, n))
        ended = ids.index(byte_level().eos_token_id) if byte_level().eos_token_id in ids else len(ids)
        assert row["before"] == oracle.cut(byte_level().decode(ids[:ended]))


def test_the_group_of_other_prompts_is_refused(model):
    probe = replace(PROBES[0], group="paraphrase")
    with pytest.raises(FactError, match="of the group 'paraphrase', which is the name of other prompts"):
        cc.Editor(model, byte_level()).score(edits_of(model, request(replace(START, probes=(probe,)))))


def test_what_is_asked_of_each_problem():
    """The accepted answers of a prompt are those of what is trained, with other words for it."""
    fact = replace(START, target_new_aliases=("putting",), target_true_aliases=("court tennis",))
    accepted = {problem: answers._accepted(request(fact, problem)) for problem in ("error_injection", "fact_erasure")}
    assert accepted == {"error_injection": (fact.target_new, "putting"), "fact_erasure": ("tennis", "court tennis")}
    assert answers._accepted(request(fact, "tracing_reversal")) == ()


# --- where answers end, and what matches ---


@pytest.fixture
def said(monkeypatch, model):
    """Gives the answers of a model that goes on with a text, and how many tokens it was asked for."""

    def answered(text, accepted=("golf",), positions=64):
        ids, asked = byte_level()(text)["input_ids"] + [byte_level().eos_token_id] * 40, []

        def continuations(session, texts, lengths, deltas):
            asked.append(lengths[0])
            begun = len(texts[0]) - 1
            return [tuple(ids[begun : begun + lengths[0]])]

        monkeypatch.setattr(answers, "continuations", continuations)
        session = cc.Editor(model, byte_level()).session
        (found,) = answers.answers(session, [answers.Text((5,))], [accepted])
        return found, asked

    return answered


@pytest.mark.parametrize(
    ("text", "accepted", "expected"),
    [
        (" golf", ("golf",), "golf"),
        (" golf. In Rome", ("golf",), "golf."),
        (" golf\nRome. x", ("golf",), "golf"),
        ("\n golf", ("golf",), ""),
        (" St. Louis. In Rome", ("golf",), "St."),
        (" St. Louis. In Rome", ("Rome", "St. Louis"), "St. Louis."),
        (" D.C. In Rome", ("D.C.",), "D.C."),
        (" Rome\u3002x", ("Rome",), "Rome\u3002"),
    ],
)
def test_answers_end_naturally(said, text, accepted, expected):
    assert said(text, accepted)[0] == expected


def test_only_what_has_not_ended_is_continued(said):
    assert said(" golf. In Seattle they speak")[1] == [8]
    text, asked = said(" tennis" * 40)
    assert (asked, text) == ([8, 24], ("tennis " * 32).strip())


@pytest.mark.parametrize(
    ("text", "answer", "same"),
    [
        ("The Space  Needle.", "space needle", True),
        ("an Apple!", "apple", True),
        ("apples", "apple", False),
        ("", "golf", False),
        ("The The", "the the", True),
        ("", "The The", False),
        ("\u00ab\u0420\u0438\u043c\u00bb", "\u0440\u0438\u043c", True),
        ("St. Louis. It is", "St. Louis", True),
        ("St. Paul", "St. Louis", False),
        ("U.S.", "US", False),  # its first full stop is an end
    ],
)
def test_exact_match(text, answer, same):
    assert answers.matches(text, ("nothing", answer)) == same


@pytest.mark.parametrize(
    ("text", "answer", "begins"),
    [
        ("Paris, in France", "paris", True),
        ("Parisian", "Paris", False),
        ("in Paris", "Paris", False),
        ("\u5317\u4eac\u662f\u9996\u90fd", "\u5317\u4eac", True),
        ("", "Paris", False),
    ],
)
def test_beginnings_of_answers(text, answer, begins):
    assert answers.begins_with(text, (answer,)) == begins


def test_normalisation_is_squads():
    for fact in FULL:
        for text in (fact.text, f"The {fact.target_true}, a {fact.target_new}!"):
            assert answers.normalised(text) == oracle.normalize_answer(text)
