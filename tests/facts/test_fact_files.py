"""Fact files: every schema, and for every way to be wrong an error that names the file and the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.fact_records import COUNTERFACT

from causalcone.engine.errors import FactError
from causalcone.engine.facts import Fact
from causalcone.runners.facts.files import load_facts, save_facts

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

ZSRE: list[dict[str, Any]] = [
    {
        "subject": "Bo",
        "src": "Who taught Bo, and is Bo alive?",
        "pred": "",
        "rephrase": "By whom was Bo taught?",
        "alt": "unused",
        "answers": ["Ida Falk", "I. Falk"],
        "loc": "nq question: where do swallows go in winter",
        "loc_ans": "Africa",
        "cond": "",
    },
    {
        "subject": "Ek",
        "src": "Where is Ek?",
        "rephrase": "Ek is where?",
        "answers": ["Umeå"],
        "loc": "who sang",
        "loc_ans": "A",
    },
    {
        "subject": "Al",
        "src": "Where is Al?",
        "rephrase": "Al is where?",
        "answers": ["Umeå"],
        "loc": "who sang",
        "loc_ans": "A",
    },
    {
        "subject": "Un",
        "src": "Where is Un?",
        "rephrase": "Un is where?",
        "answers": ["Bergen"],
        "loc": "who sang",
        "loc_ans": "A",
    },
]
KNOWN: dict[str, Any] = {
    "known_id": 5,
    "subject": "Rome",
    "attribute": "Italy",
    "template": "{} lies in",
    "prediction": " Italy, and",
    "prompt": "Rome, not Rome in Georgia, lies in",
    "relation_id": "P17",
}
OWN: dict[str, Any] = {"id": "a", "prompt": "{} plays", "subject": "Ann Lee", "target_true": "tennis"}


def write(folder: Path, content: Any, name: str = "facts.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def counterfact(index: int, **changes: Any) -> dict[str, Any]:
    rewrite = {
        "prompt": "{} was born in",
        "subject": "Bo",
        "target_true": {"str": "Oslo"},
        "target_new": {"str": "Lima"},
    }
    return {"case_id": index, "requested_rewrite": {**rewrite, **changes}}


def test_counterfact_record_keeps_every_field(tmp_path: Path) -> None:
    (fact,) = load_facts(write(tmp_path, [COUNTERFACT]))
    assert fact == Fact(
        id="17",
        prompt="{} was born in",
        subject="Åse Lund",
        target_true="Oslo",
        target_new="Lima",
        paraphrase_prompts=("It rained. Åse Lund comes from", "Åse Lund's home town is"),
        neighborhood_prompts=("Kari Moe was born in",),
        attribute_prompts=("Ana Paz was born in",),
        generation_prompts=("Åse Lund's childhood was",),
        relation_id="P19",
        target_true_id="Q585",
        target_new_id="Q2868",
    )


def test_counterfact_prompts_alone_are_enough(tmp_path: Path) -> None:
    records = [counterfact(0), counterfact(1)]
    del records[1]["requested_rewrite"]["target_new"]
    first, second = load_facts(write(tmp_path, records))
    assert (first.id, first.target_new, first.paraphrase_prompts, first.target_new_id) == ("0", "Lima", (), None)
    assert second.target_new is None


def test_zsre_in_hases_form(tmp_path: Path) -> None:
    facts = load_facts(write(tmp_path, ZSRE))
    assert [fact.id for fact in facts] == ["0", "1", "2", "3"]
    assert facts[0].prompt == "Question: Who taught {}, and is Bo alive? Answer:"
    assert facts[0].target_true == "Ida Falk"
    assert facts[0].paraphrase_prompts == ("Question: By whom was Bo taught? Answer:",)
    assert facts[0].neighborhood_prompts == ("Question: where do swallows go in winter? Answer:",)
    assert facts[1].neighborhood_prompts == ("Question: who sang? Answer:",)


def test_zsre_false_targets_are_first_answers_of_other_records(tmp_path: Path) -> None:
    path = write(tmp_path, ZSRE)
    draws = [[fact.target_new for fact in load_facts(path, seed=seed)] for seed in range(40)]
    assert {draw[0] for draw in draws} == {"Umeå", "Bergen"}
    assert {draw[1] for draw in draws} == {"Ida Falk", "Bergen"}
    assert {draw[2] for draw in draws} == {"Ida Falk", "Bergen"}
    assert {draw[3] for draw in draws} == {"Ida Falk", "Umeå"}
    assert draws[7] == [fact.target_new for fact in load_facts(path, seed=7)]


def test_zsre_false_targets_are_uniform_over_distinct_answers(tmp_path: Path) -> None:
    answers = ["a"] * 900 + ["b"] * 50 + ["c"] * 50
    records = [{"subject": "S", "src": "What is S?", "answers": [answer]} for answer in answers]
    drawn = [fact.target_new for fact in load_facts(write(tmp_path, records))[:900]]
    assert set(drawn) == {"b", "c"}
    assert abs(drawn.count("b") - 450) < 5 * 15  # five standard deviations of a fair coin


def test_zsre_false_targets_depend_on_neither_limit_nor_skipping(tmp_path: Path) -> None:
    whole = [fact.target_new for fact in load_facts(write(tmp_path, ZSRE), seed=3)]
    assert [fact.target_new for fact in load_facts(write(tmp_path, ZSRE), limit=2, seed=3)] == whole[:2]
    broken = [ZSRE[0], {**ZSRE[1], "subject": "absent"}, *ZSRE[2:]]
    with pytest.warns(UserWarning, match="absent"):
        kept = load_facts(write(tmp_path, broken), seed=3, on_error="skip")
    assert [fact.target_new for fact in kept] == [whole[0], *whole[2:]]
    assert [fact.id for fact in kept] == ["0", "2", "3"]


def test_zsre_with_one_answer_has_no_false_target(tmp_path: Path) -> None:
    assert load_facts(write(tmp_path, ZSRE[:1]))[0].target_new is None


def test_zsre_in_mengs_form(tmp_path: Path) -> None:
    fact = load_facts(write(tmp_path, ZSRE), zsre_form="meng")[0]
    assert fact.prompt == "Who taught {}, and is Bo alive?"
    assert (fact.target_true, fact.target_new) == ("Ida Falk", "Ida Falk")
    assert fact.paraphrase_prompts == ("By whom was Bo taught?",)
    assert fact.neighborhood_prompts == ("nq question: where do swallows go in winter?",)


def test_known_fact_becomes_a_template_at_the_first_occurrence(tmp_path: Path) -> None:
    (fact,) = load_facts(write(tmp_path, [KNOWN]))
    assert fact == Fact("5", "{}, not Rome in Georgia, lies in", "Rome", "Italy", relation_id="P17")
    assert fact.text == KNOWN["prompt"]


def test_own_lines_round_trip(tmp_path: Path) -> None:
    facts = [
        Fact(
            id="x 1",
            prompt="{} säger",
            subject='Åse \u2028 "Lund"',
            target_true=" hej",
            target_new="då",
            paraphrase_prompts=("p\n1", "p2"),
            neighborhood_prompts=("n",),
            attribute_prompts=("a",),
            generation_prompts=("g",),
            counterfactual_subject="Bo Ek",
            relation_id="P1",
            target_true_id="Q1",
            target_new_id="Q2",
        ),
        Fact("2", "in {}", "日本 🗾", "東京"),
    ]
    path = tmp_path / "facts.jsonl"
    save_facts(iter(facts), path)
    assert load_facts(path) == facts
    lines = path.read_bytes().decode().split("\n")
    assert json.loads(lines[1]) == {"id": "2", "prompt": "in {}", "subject": "日本 🗾", "target_true": "東京"}
    assert lines[2:] == [""]


def test_own_lines_may_lack_an_id_or_number_it(tmp_path: Path) -> None:
    lines = [{**OWN, "id": 7}, {key: OWN[key] for key in OWN if key != "id"}]
    path = write(tmp_path, "\n".join(map(json.dumps, lines)))
    assert [fact.id for fact in load_facts(path)] == ["7", "1"]


@pytest.mark.parametrize("record", [COUNTERFACT, ZSRE[0], KNOWN, OWN], ids=["counterfact", "zsre", "known", "own"])
def test_every_schema_as_list_lines_or_single_object(tmp_path: Path, record: dict[str, Any]) -> None:
    other = {**record, "case_id" if "src" in record else next(iter({"case_id", "known_id", "id"} & record.keys())): "b"}
    as_list = load_facts(write(tmp_path, [record, other]))
    as_lines = load_facts(write(tmp_path, f"{json.dumps(record)}\n\n{json.dumps(other)}\n"))
    single = load_facts(write(tmp_path, json.dumps(record, indent=2)))
    assert len(as_list) == 2
    assert as_lines == as_list
    assert single == as_list[:1]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_line_endings_and_byte_order_mark(tmp_path: Path, ending: str, mark: str) -> None:
    path = tmp_path / "facts.jsonl"
    lines = [json.dumps({**OWN, "id": name, "subject": "Åse"}, ensure_ascii=False) for name in "ab"]
    path.write_bytes((mark + ending.join(lines) + ending).encode())
    assert [(fact.id, fact.subject) for fact in load_facts(path)] == [("a", "Åse"), ("b", "Åse")]


def test_limit_takes_the_first_and_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path, [counterfact(0), counterfact(1), counterfact(2, subject="")])
    assert [fact.id for fact in load_facts(path, limit=2)] == ["0", "1"]
    with pytest.raises(FactError, match="subject is empty"):
        load_facts(path, limit=3)


BAD_RECORDS: dict[str, tuple[Any, str]] = {
    "no subject": ({"case_id": 9, "requested_rewrite": {"prompt": "{} a"}}, r"requested_rewrite\.subject is missing"),
    "empty subject": (counterfact(9, subject="  "), r"requested_rewrite\.subject is empty"),
    "subject no text": (counterfact(9, subject=4), r"requested_rewrite\.subject must be a string"),
    "empty target": (counterfact(9, target_true={"str": ""}), r"requested_rewrite\.target_true\.str is empty"),
    "empty new target": (counterfact(9, target_new={"str": ""}), r"requested_rewrite\.target_new\.str is empty"),
    "no place for the subject": (counterfact(9, prompt="It is in"), r"subject 'Bo' is not in its prompt 'It is in'"),
    "two places": (counterfact(9, prompt="{} and {}"), r"must hold exactly one '\{\}'"),
    "half a character": (counterfact(9, subject="\ud83d"), r"surrogate"),
    "prompts no list": ({**counterfact(9), "paraphrase_prompts": "one"}, r"paraphrase_prompts must be a list"),
    "other shape": ({"case_id": 9, "x": 1}, r"requested_rewrite is missing"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_counterfact_record_is_named(tmp_path: Path, name: str) -> None:
    record, complaint = BAD_RECORDS[name]
    path = write(tmp_path, [counterfact(0), counterfact(1), record])
    with pytest.raises(FactError, match=rf"facts\.json: record 2 \(case_id 9\): .*{complaint}"):
        load_facts(path)
    with pytest.warns(UserWarning, match=rf"skipped 1 records(?s:.*)record 2 \(case_id 9\): .*{complaint}"):
        assert [fact.id for fact in load_facts(path, on_error="skip")] == ["0", "1"]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({**KNOWN, "subject": "Oslo"}, r"record 0 \(known_id 5\): the subject 'Oslo' is not in its prompt"),
        ({**KNOWN, "prompt": "Rome {} lies"}, r"record 0 \(known_id 5\): .*exactly one '\{\}'"),
        ({**KNOWN, "attribute": ""}, r"record 0 \(known_id 5\): attribute is empty"),
        ({**KNOWN, "known_id": 1.5}, r"record 0 \(known_id 1.5\): known_id must be a whole number or a string"),
        ({**ZSRE[0], "subject": "Oslo"}, r"record 0: the subject 'Oslo' is not in its src"),
        ({**ZSRE[0], "answers": []}, r"record 0: answers is empty"),
        ({**ZSRE[0], "answers": [""]}, r"record 0: answers.0 is empty"),
        ({**OWN, "neighbourhood_prompts": []}, r"record 0 \(id a\): neighbourhood_prompts is not a field of a fact"),
        ({**OWN, "target_new": ""}, r"record 0 \(id a\): target_new is empty"),
        ({**OWN, "prompt": "plays"}, r"record 0 \(id a\): the subject 'Ann Lee' is not in its prompt 'plays'"),
        ({**OWN, "prompt": "{} and {}"}, r"record 0 \(id a\): .*exactly one '\{\}'"),
        ({**OWN, "id": True}, r"record 0 \(id True\): id must be"),
    ],
)
def test_bad_record_of_another_schema_is_named(tmp_path: Path, record: dict[str, Any], complaint: str) -> None:
    with pytest.raises(FactError, match=complaint):
        load_facts(write(tmp_path, [record]))


def test_a_broken_first_record_does_not_hide_the_schema(tmp_path: Path) -> None:
    path = write(tmp_path, [3, counterfact(1)])
    with pytest.raises(FactError, match="record 0 is a number, not an object"):
        load_facts(path)
    with pytest.warns(UserWarning, match="record 0"):
        assert [fact.id for fact in load_facts(path, on_error="skip")] == ["1"]


def test_duplicate_ids(tmp_path: Path) -> None:
    path = write(tmp_path, [counterfact(4), counterfact(5), counterfact(4, subject="Al"), counterfact(6)])
    with pytest.raises(FactError, match=r"unique, but '4' occur"):
        load_facts(path)
    with pytest.warns(UserWarning, match=r"record 2 \(case_id 4\): the id '4' was there before"):
        facts = load_facts(path, on_error="skip")
    assert [(fact.id, fact.subject) for fact in facts] == [("4", "Bo"), ("5", "Bo"), ("6", "Bo")]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", r"facts\.json is empty"),
        (" \n", r"facts\.json is empty"),
        ('[{"a": 1},\n {"a": }]', r"not JSON: .* at line 2, column 8"),
        ('{"id": "a"}\n{"id" "b"}\n', r"not JSON lines: .* at line 2, column 7"),
        ("[" * 200_000, r"nested too deeply"),
        ("[]", r"an empty list.*CounterFact.*zsRE.*known facts.*own lines"),
        ("[[1]]", r"its first item is a list"),
        ('"text"', r"its first item is a string"),
        ('[{"relation_id": "P1", "samples": []}]', r"the keys 'relation_id', 'samples'\. Supported are CounterFact"),
        ("{}", r"an empty object"),
    ],
)
def test_unusable_content(tmp_path: Path, content: str, complaint: str) -> None:
    with pytest.raises(FactError, match=f"(?s){complaint}"):
        load_facts(write(tmp_path, content))


def test_unusable_paths(tmp_path: Path) -> None:
    with pytest.raises(FactError, match=r"absent\.json does not exist"):
        load_facts(tmp_path / "absent.json")
    with pytest.raises(FactError, match="is a folder"):
        load_facts(tmp_path)
    (tmp_path / "latin.json").write_bytes('[{"a": "é"}]'.encode("latin-1"))
    with pytest.raises(FactError, match=r"not UTF-8 text \(byte 8\)"):
        load_facts(tmp_path / "latin.json")
    with pytest.raises(FactError, match="cannot write"):
        save_facts([Fact(**OWN)], tmp_path / "absent" / "facts.jsonl")


def test_unusable_arguments(tmp_path: Path) -> None:
    path = write(tmp_path, [COUNTERFACT])
    with pytest.raises(FactError, match="limit is 0"):
        load_facts(path, limit=0)
    with pytest.raises(FactError, match="zsre_form is 'other'"):
        load_facts(path, zsre_form="other")  # type: ignore[arg-type]
    with pytest.raises(FactError, match="on_error is 'ignore'"):
        load_facts(path, on_error="ignore")  # type: ignore[arg-type]


def test_no_usable_fact_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(FactError, match=r"no usable fact; the first problem: .*record 0 \(case_id 1\)"):
        load_facts(write(tmp_path, [counterfact(1, subject="")]), on_error="skip")


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the sample CounterFact files are not beside this checkout")
def test_real_counterfact_files() -> None:
    (fact,) = load_facts(SHARED_DATA / "counterfact_record.json")
    assert (fact.id, fact.text, fact.target_true, fact.target_new) == ("4402", "Singled Out debuted on", "MTV", "CBS")
    assert (len(fact.paraphrase_prompts), len(fact.neighborhood_prompts)) == (2, 10)
    facts = load_facts(SHARED_DATA / "counterfact_prompts.json")
    assert len(facts) == 60
    assert facts[0].text == "The mother tongue of Danielle Darrieux is"
