"""Every format and tables with named columns, all the way: recognised, saved again, converted, traced and edited."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import format_records as records
from helpers.format_records import FORMATS, load, write

import causalcone as cc
from causalcone.runners.facts.schemas import SCHEMAS, recognise

MODEL = Path(__file__).parents[1] / "guards" / "artifacts" / "model"

# --- tables ---

ROWS = [
    {"nr": "a", "person": "Åse, Lund", "question": "Where is Åse, Lund from?", "city": "Oslo", "false city": "Lima"},
    {"nr": "b", "person": "Bo", "question": "Where is Bo from?", "city": "Rome", "false city": ""},
]
COLUMNS = {"id": "nr", "subject": "person", "prompt": "question", "target_true": "city", "target_new": "false city"}
EXPECTED = [
    cc.Fact("a", "Where is {} from?", "Åse, Lund", "Oslo", "Lima"),
    cc.Fact("b", "Where is {} from?", "Bo", "Rome"),
]


def table(folder: Path, suffix: str, rows: list[dict[str, str]] = ROWS) -> Path:
    path = folder / f"rows{suffix}"
    filled = [{key: value or None for key, value in row.items()} for row in rows]
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(filled), path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in filled))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_flat_tables_with_named_columns(suffix: str, tmp_path: Path, run: Any) -> None:
    path = table(tmp_path, suffix)
    assert cc.load_facts(path, columns=COLUMNS) == EXPECTED
    out = tmp_path / "out.jsonl"
    named = [part for field, column in COLUMNS.items() for part in ("--column", f"{field}={column}")]
    code, printed, _ = run("data", path, *named, "--out", out)
    assert (code, cc.load_facts(out)) == (0, EXPECTED)
    assert "recognised by: named columns id=nr, subject=person" in printed
    with pytest.raises(cc.CausalconeError, match=r"holds no facts: .*\bnr'?, '?person\b.*--column FIELD=COLUMN"):
        cc.load_facts(path)


def test_tables_of_a_known_format(tmp_path: Path) -> None:
    rows = [{"id": "7", "prompt": "{} is", "subject": "Bo", "target_true": "x", "target_new": "00017"}]
    assert cc.load_facts(table(tmp_path, ".csv", rows)) == [cc.Fact("7", "{} is", "Bo", "x", "00017")]
    wide = [{**rows[0], "paraphrase": "Bo has been", "note": "unread"}]
    (fact,) = cc.load_facts(table(tmp_path, ".tsv", wide))
    assert (fact.paraphrase_prompts, fact.target_true) == (("Bo has been",), "x")
    pq.write_table(pa.Table.from_pylist([records.KNOWEDIT]), tmp_path / "knowedit.parquet")
    assert cc.load_facts(tmp_path / "knowedit.parquet") == load(tmp_path, records.KNOWEDIT)


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"subjekt": "person"}, "there is no field 'subjekt' for the column 'person'; choose from id, subject, prompt"),
        (
            {"subject": "name"},
            "there is no column 'name' for subject; there are nr, person, question, city",
        ),
        ({"subject": "person", "prompt": "question"}, "record 0: target_true and target_new are missing"),
        ({"prompt": "question", "target_new": "city"}, r"record 0: subject is missing.*--column subject=COLUMN"),
        ({"subject": "person", "target_new": "city"}, "record 0: prompt is missing"),
    ],
)
def test_columns_that_cannot_be_used(columns: dict[str, str], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(cc.CausalconeError, match=complaint):
        cc.load_facts(table(tmp_path, ".csv"), columns=columns)


def test_options_and_tables_that_cannot_be_read(tmp_path: Path, run: Any) -> None:
    for given in (["subject"], ["subject="], ["subject=a", "--column", "subject=b"]):
        code, _, error = run("data", table(tmp_path, ".csv"), "--column", *given, "--out", tmp_path / "out")
        assert (code, "is not FIELD=COLUMN, or names a field again" in error) == (2, True)
    for name, content in (("empty.csv", ""), ("no.parquet", "text"), ("head.tsv", "subject\tprompt\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(cc.CausalconeError, match=rf"{name} (cannot be read as a table|has no rows)"):
            cc.load_facts(tmp_path / name)


# --- all formats, all the way ---


@pytest.mark.parametrize("name", FORMATS)
def test_facts_of_every_format_go_round(name: str, tmp_path: Path) -> None:
    facts = load(tmp_path, *FORMATS[name])
    cc.save_facts(facts, tmp_path / "saved.jsonl")
    assert cc.load_facts(tmp_path / "saved.jsonl") == facts


def test_every_registration_is_tried() -> None:
    found = {recognise(content) for content in FORMATS.values()}
    assert {schema.name for schema in SCHEMAS} == {each.name for each in found if each}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_on_the_command_line(name: str, tmp_path: Path, run: Any) -> None:
    path, out = write(tmp_path, FORMATS[name]), tmp_path / "out.jsonl"
    code, printed, error = run("data", path, "--out", out, "--model", MODEL)
    assert (code, error) == (0, "")
    facts = cc.load_facts(path)
    assert cc.load_facts(out) == facts
    found = recognise(FORMATS[name])
    assert found
    assert printed.splitlines()[:2] == [f"schema: {found.description}", f"recognised by: {found.why}"]
    asked = [probe.group for fact in facts for probe in fact.probes]
    counted = ", ".join(f"{group} {asked.count(group)}" for group in sorted(set(asked)))
    assert (f"probes: {counted}" in printed.splitlines()) == bool(asked)
    code, _, error = run("trace", "--model", MODEL, "--facts", path, "--samples", 2, "--out", tmp_path / "t", "--quiet")
    assert code == 0, error
    edit = ["edit", "--model", MODEL, "--facts", path, "--method", "finetune:1", "--layers", 1, "--set", "steps=2"]
    code, _, error = run(*edit, "--no-filter", "--out", tmp_path / "e", "--quiet")
    edited = json.loads((tmp_path / "e" / "run.json").read_text()) if code == 0 else {}
    if name == "known":  # which have no new answer
        assert (code, "has no target_new; give the answer" in error) == (2, True)
    elif all(fact.target_new == fact.target_true for fact in facts):
        assert (code, edited["problem"]) == (0, "fact_amplification")
        assert "the problem is fact_amplification, which trains towards it" in error
    else:
        assert (code, edited["problem"]) == (0, "error_injection")


def test_an_impossible_problem_says_which_is_possible(tmp_path: Path, run: Any) -> None:
    path = write(tmp_path, [records.ULTRAEDIT])
    edit = ["edit", "--model", MODEL, "--facts", path, "--method", "finetune:1", "--layers", 1, "--no-filter"]
    code, _, error = run(*edit, "--problem", "error_injection", "--out", tmp_path / "e")
    assert code == 2
    assert "is the same answer as target_true; give another, or the problem fact_amplification" in error


def test_columns_of_other_commands(tmp_path: Path, run: Any) -> None:
    named = [part for field, column in COLUMNS.items() for part in ("--column", f"{field}={column}")]
    run_of = ["trace", "--model", MODEL, "--facts", table(tmp_path, ".csv"), "--samples", 2, "--out", tmp_path / "t"]
    code, _, error = run(*run_of, *named, "--quiet")
    assert (code, error) == (0, "")
    assert "subject=person" in json.loads((tmp_path / "t" / "run.json").read_text())["columns"]
