"""What becomes of the fields of every format of fact files, and which records are refused how."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from helpers import format_records as records
from helpers.format_records import load, write

import causalcone as cc


def probes(fact: cc.Fact) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(probe.group, probe.prompt, probe.answers) for probe in fact.probes]


# --- what becomes of fields ---


def test_knowedit(tmp_path: Path) -> None:
    (fact,) = load(tmp_path, records.KNOWEDIT)
    assert (fact.prompt, fact.subject) == ("The place of death of {} is", "Leo Arons")
    assert (fact.target_new, fact.target_true, fact.target_true_aliases) == ("Berlin", "Vienna", ("Wien",))
    assert fact.paraphrase_prompts == ("Leo Arons died in",)
    assert probes(fact) == [
        ("portability/Logical_Generalization", "Is Leo Arons alive?", ("no", "is dead")),
        ("portability/Reasoning", "The mayor of the place of death is", ("Kai Wegner", "Kai Peter Wegner")),
        ("locality/Relation_Specificity", "The father of Leo Arons is", ("Albert Arons",)),
    ]


def test_knowedit_by_other_names(tmp_path: Path) -> None:
    (fact,) = load(tmp_path, records.WIKIBIO)
    assert (fact.text, fact.subject) == (records.WIKIBIO["text"], "john russell reynolds")
    assert (fact.target_new, fact.target_true) == ("a physician.", "a physician.")
    plain = {key: value for key, value in records.KNOWEDIT.items() if key not in ("portability", "rephrase_prompt")}
    (fact,) = load(tmp_path, {**plain, "rephrase": ["a", "b"], "portability": None})
    assert (fact.paraphrase_prompts, len(fact.probes)) == (("a", "b"), 1)


def test_easyedit(tmp_path: Path) -> None:
    (fact,) = load(tmp_path, records.EASYEDIT)
    assert fact == cc.Fact(
        "2", "{}, the", "Toko Yasuda", "guitar", "piano",
        paraphrase_prompts=("Toko Yasuda is incredible at",),
        neighborhood_prompts=("John Lennon performs on the",),
        neighborhood_target="guitar",
    )  # fmt: skip
    (fact,) = load(tmp_path, records.REQUEST)
    assert probes(fact) == [
        ("portability/one_hop", "The capital of the country of Lyon is", ("Rome",)),
        ("locality/neighborhood", "Spain's is", ("Madrid",)),
        ("locality/neighborhood", "Italy's is", ("Rome",)),
    ]


CALL = {
    "prompts": ["The capital of France is", "Rome lies in"],
    "ground_truth": ["Paris", "Italy"],
    "target_new": ["Rome", "Spain"],
    "subject": ["France", "Rome"],
    "rephrase_prompts": ["France's capital is", "Rome is in"],
    "locality_inputs": {"neighborhood": {"prompt": ["Spain's is", "Oslo is in"], "ground_truth": ["Madrid", "Norway"]}},
    "portability_inputs": {"one_hop": {"prompt": [["a", "b"], None], "ground_truth": [["c", "d"], None]}},
    "loc_prompts": ["of another length"],
    "keep_original_weight": True,
}


def test_arguments_of_easyedit(tmp_path: Path) -> None:
    call = {**CALL, "portability_inputs": {"one_hop": {"prompt": [["a", "b"], "e"], "ground_truth": [["c", "d"], "f"]}}}
    first, second = cc.load_facts(write(tmp_path, call))
    assert (first.id, first.text, first.target_true, first.target_new) == ("0", CALL["prompts"][0], "Paris", "Rome")
    assert probes(first)[:2] == [("portability/one_hop", "a", ("c",)), ("portability/one_hop", "b", ("d",))]
    assert second.paraphrase_prompts == ("Rome is in",)
    assert probes(second) == [
        ("portability/one_hop", "e", ("f",)),
        ("locality/neighborhood", "Oslo is in", ("Norway",)),
    ]
    for lists, complaint in (
        ({"subject": ["France"]}, "subject has 1 items, and prompts 2; give one for every prompt"),
        ({"target_new": "Rome"}, "target_new must be a list, with one for every prompt"),
        ({"locality_inputs": {"near": {"prompt": ["a"], "ground_truth": ["b"]}}}, r"locality_inputs.near.prompt has 1"),
    ):
        with pytest.raises(cc.CausalconeError, match=rf"facts\.json: {complaint}"):
            cc.load_facts(write(tmp_path, {**call, **lists}))


def test_zsre_towards_the_alternative(tmp_path: Path) -> None:
    (fact,) = load(tmp_path, records.ZSRE, zsre_form="alt")
    assert fact == cc.Fact(
        "0", "What is the native language of {}?", "Christiane Cohendy", "French", "German",
        paraphrase_prompts=(records.ZSRE["rephrase"],),
        neighborhood_prompts=("nq question: where do swallows go",),
        neighborhood_target="Africa",
        target_true_aliases=("Français",),
        probes=(cc.FactProbe("portability/one_hop", "Where is it spoken?", ("Germany",)),),
    )  # fmt: skip
    with pytest.raises(cc.CausalconeError, match="record 0: alt is empty"):
        load(tmp_path, {**records.ZSRE, "alt": ""}, zsre_form="alt")
    lacking = {key: value for key, value in records.ZSRE.items() if key != "alt"}
    with pytest.raises(cc.CausalconeError, match="record 0: target_new is missing"):
        load(tmp_path, lacking, zsre_form="alt")
    assert load(tmp_path, {**records.ZSRE, "alt": ""})[0].target_true == "French"


def test_flat_benchmarks(tmp_path: Path) -> None:
    (fact,) = load(tmp_path, records.WIKIBIGEDIT)
    assert (fact.prompt, fact.target_new, fact.target_true) == ("What is the field of {}?", "ecology", "ecology")
    assert (fact.neighborhood_prompts, fact.neighborhood_target) == (("Who wrote Emma?",), "Jane Austen")
    assert probes(fact) == [
        ("portability/personas", records.WIKIBIGEDIT["personas"], ("ecology",)),
        ("portability/mhop", records.WIKIBIGEDIT["mhop"], ("ecologists",)),
    ]
    (fact,) = load(tmp_path, {**records.WIKIBIGEDIT, "personas": None, "mhop": float("nan"), "mhop_ans": None})
    assert fact.probes == ()
    (fact,) = load(tmp_path, records.ULTRAEDIT)
    assert (fact.prompt, fact.target_new) == ("Where was {} born?", "Lima")
    (fact,) = load(tmp_path, records.ZSRE_LIFELONG)
    assert (fact.prompt, fact.target_new) == ("What university did {} attend?", "University of Michigan")


def test_several_edits_of_a_case(tmp_path: Path) -> None:
    first, second = load(tmp_path, records.MQUAKE)
    assert [fact.id for fact in (first, second)] == ["2500/0", "2500/1"]
    assert (first.text, first.target_true, first.target_new) == (
        "Vince McMahon is a citizen of", "United States of America", "Libya",
    )  # fmt: skip
    assert first.paraphrase_prompts == ("What is the country of citizenship of Vince McMahon?",)
    assert (first.target_new_id, first.relation_id, first.probes) == ("Q1016", "P27", ())
    answers = ("Franklin", "Franklin, Kentucky")
    assert probes(second) == [
        *(("portability/questions", question, answers) for question in records.MQUAKE["questions"]),
        ("portability/single_hops", "Who leads WWE?", ("Vince McMahon", "Vince")),
    ]
    assert load(tmp_path, records.MQUAKE, limit=1) == [first]
    other = {**records.MQUAKE, "case_id": 7}
    assert [fact.id for fact in load(tmp_path, records.MQUAKE, other, limit=3)] == ["2500/0", "2500/1", "7/0"]
    with pytest.raises(cc.CausalconeError, match="'2500/0', '2500/1' occur more than once"):
        load(tmp_path, records.MQUAKE, records.MQUAKE)


def test_ripples(tmp_path: Path) -> None:
    (fact,) = load(tmp_path, records.RIPPLE)
    assert (fact.id, fact.prompt) == ("0", "The country of {} is")
    assert (fact.subject, fact.target_new, fact.target_true) == (
        "Leonardo DiCaprio", "Syria", "USA",
    )  # fmt: skip
    assert (fact.target_new_id, fact.target_true_id) == ("Q858", "Q30")
    mother = ("Irmelin DiCaprio", "Irmelin Indenbirken")
    assert [(probe.group, probe.name, probe.answers, probe.every) for probe in fact.probes] == [
        ("portability/Logical_Generalization", "AND of 2", mother, True),
        ("portability/Logical_Generalization", "AND of 2", ("Leonardo DiCaprio",), True),
        ("portability/Compositionality_II", "CHILD", ("Syria",), True),
        ("portability/Subject_Aliasing", "COUNTRY_OF_CITIZENSHIP", ("Syria", "Syrian Arab Republic"), True),
        ("locality/Relation_Specificity", "MOTHER", mother, True),
    ]
    condition = cc.ProbeCondition("The name of the mother of Leonardo DiCaprio is", mother)
    assert [probe.conditions for probe in fact.probes][-1] == (condition,)


def ripple(*without: str, **edit: Any) -> dict[str, Any]:
    kept = {key: value for key, value in records.RIPPLE["edit"].items() if key not in without}
    tests = {key: [] for key, value in records.RIPPLE.items() if isinstance(value, list)}
    return {**records.RIPPLE, **tests, "edit": {**kept, **edit}}


def test_ripples_without_answers_that_name_things(tmp_path: Path) -> None:
    with pytest.raises(cc.CausalconeError, match=r"record 0: edit.subject is missing: .*'Q38111'"):
        load(tmp_path, ripple())
    named = ripple(subject="Leonardo DiCaprio")
    (fact,) = load(tmp_path, named)
    assert (fact.text + " " + str(fact.target_new), fact.target_true) == (
        records.RIPPLE["edit"]["prompt"][:-1], "USA",
    )  # fmt: skip
    recent = ripple("original_fact", subject="Leonardo DiCaprio")
    with pytest.raises(cc.CausalconeError, match=r"record 0: edit.target is missing: .*'Q858'"):
        load(tmp_path, recent)
    (fact,) = load(tmp_path, ripple("original_fact", subject="Leonardo DiCaprio", target="Syria"))
    assert (fact.target_true, fact.target_new) == ("Syria", "Syria")


@pytest.mark.parametrize(
    ("new", "old"),
    [("Carol Chu", "Casey Lee"), ("United States", "United Kingdom"), ("New Zealand", "New York City"), ("Bo", "")],
)
@pytest.mark.parametrize("beginning", ["The home of {} is", "{} Junior follows"])
def test_targets_that_begin_alike_are_cut_before_what_they_share(
    new: str, old: str, beginning: str, tmp_path: Path
) -> None:
    record = ripple(subject="Leonardo DiCaprio")
    sentence = beginning.replace("{}", "Leonardo DiCaprio")
    record["edit"] |= {"prompt": f"{sentence} {new}.", "original_fact": {"prompt": f"{sentence} {old}."}}
    (fact,) = load(tmp_path, record)
    assert (fact.prompt, fact.target_new, fact.target_true) == (beginning, new, old or new)


# --- subjects ---


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("Rome is the capital of", "Rome", "{} is the capital of"),
        ("Also, Al is", "Al", "Also, {} is"),
        ("Bo and Bo are", "Bo", "{} and Bo are"),
        ("法国的首都是", "法国", "{}的首都是"),
        ("{} and Bo are", "Bo", "{} and Bo are"),
    ],
)
def test_subjects_are_found(prompt: str, subject: str, expected: str, tmp_path: Path) -> None:
    own = {"id": "a", "prompt": prompt, "subject": subject, "target_true": "x"}
    flat = {"prompt": prompt, "subject": subject, "target_new": "x"}
    assert [fact.prompt for fact in (*load(tmp_path, own), *load(tmp_path, flat))] == [expected] * 2


# --- bad records are named ---


def changed(record: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The record with a value changed, or left out where it is None."""
    new = copy.deepcopy(record)
    *folders, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place: Any = new
    for part in folders:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return new


BAD = [
    ("MQUAKE", "requested_rewrite/0/target_true", None, "requested_rewrite.0.target_true is missing"),
    ("MQUAKE", "requested_rewrite/1/subject", "Oslo!", None),
    ("MQUAKE", "requested_rewrite", [], "requested_rewrite is empty"),
    ("MQUAKE", "questions", [], "questions is empty"),
    ("MQUAKE", "questions", "one?", "questions must be a list"),
    ("MQUAKE", "new_answer", None, "new_answer is missing"),
    ("MQUAKE", "new_answer_alias", [""], "new_answer_alias.0 is empty"),
    ("MQUAKE", "new_single_hops/0/answer", 5, "new_single_hops.0.answer must be a string"),
    ("RIPPLE", "edit/prompt", None, "edit.prompt is missing"),
    ("RIPPLE", "edit/prompt", 4, "edit.prompt must be a string"),
    ("RIPPLE", "edit/subject", "Brad Pitt", "the subject 'Brad Pitt' is not in its edit.prompt"),
    ("RIPPLE", "Subject_Aliasing/0/test_queries/0/answers", [], "Subject_Aliasing.0.test_queries.0.answers is empty"),
    ("RIPPLE", "Subject_Aliasing/0/test_queries", [], "Subject_Aliasing.0.test_queries is empty"),
    ("RIPPLE", "Subject_Aliasing/0/test_condition", "XOR", "Subject_Aliasing.0.test_condition must be 'OR' or 'AND'"),
    ("RIPPLE", "Forgetfulness", {}, "Forgetfulness must be a list"),
    ("KNOWEDIT", "target_new", None, "target_new is missing"),
    ("KNOWEDIT", "target_new", "", "target_new is empty"),
    ("KNOWEDIT", "ground_truth", [[]], "ground_truth is empty"),
    ("KNOWEDIT", "ground_truth", 4, "ground_truth must be a text, or a list of texts"),
    ("KNOWEDIT", "subject", None, "subject is missing"),
    ("KNOWEDIT", "subject", "Oslo", "the subject 'Oslo' is not in its prompt"),
    ("KNOWEDIT", "portability", [], "portability must be an object"),
    ("KNOWEDIT", "portability/Reasoning", ["x"], "portability.Reasoning.0 must be an object"),
    ("KNOWEDIT", "portability/Reasoning/0/ground_truth", [], "portability.Reasoning.0.ground_truth is empty"),
    ("KNOWEDIT", "locality/Relation_Specificity/0/prompt", None, "locality.Relation_Specificity.0.prompt is missing"),
    ("REQUEST", "locality/neighborhood/ground_truth", ["Oslo", "A", "B"], "neighborhood has 2 prompts, and 3 answers"),
    ("REQUEST", "portability", {"New Question": "?"}, "one_hop.0.ground_truth must be a text, or a list of texts"),
    ("EASYEDIT", "prompt", " ", "prompt is empty"),
    ("EASYEDIT", "rephrase_prompt", 3, "rephrase_prompt must be a text, or a list of texts"),
    ("WIKIBIGEDIT", "ans", None, "target_new is missing"),
    ("WIKIBIGEDIT", "mhop_ans", None, "give both mhop and mhop_ans, or neither"),
    ("ULTRAEDIT", "subject", None, "subject is missing: what the prompt is about has to be named"),
    ("OWN", "probes/0/answers", [], "probes.0 the probe \"Ann Lee's ball is\" has answers ()"),
    ("OWN", "probes/0/group", "", "probes.0 a probe's group is empty; give a text"),
    ("OWN", "probes/0/kind", "x", "probes.0.kind is not a field of a probe"),
    ("OWN", "probes/0/prompt", None, "probes.0.prompt is missing"),
    ("OWN", "probes", "x", "probes must be a list"),
    ("OWN", "probes/0", "x", "probes.0 must be an object"),
    ("OWN", "probes/0/conditions/0/answers", 3, "probes.0.conditions.0.answers must be a list"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "value", "complaint"), [case for case in BAD if case[3]])
def test_bad_records_are_named(name: str, path: str, value: Any, complaint: str, tmp_path: Path) -> None:
    good = getattr(records, name)
    named = {**changed(good, path, value), "id": "bad"}
    ids = {key: value for key, value in {"case_id": 3, "id": "good"}.items() if key in good} or {"id": "good"}
    file = write(tmp_path, [{**good, **ids}, {**good, **dict.fromkeys(ids, "other")}, named])
    with pytest.raises(cc.CausalconeError) as raised:
        cc.load_facts(file)
    assert str(raised.value).startswith(f"{file}: record 2 (")
    assert complaint in str(raised.value)
    assert "Value error" not in str(raised.value)
    with pytest.warns(UserWarning, match="skipped 1 records"):
        assert cc.load_facts(file, on_error="skip")
