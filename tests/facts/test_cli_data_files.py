"""``causalcone data`` of files: the facts that it writes, records that it lists, a model's checks, what it refuses."""

import json
import re
import warnings
from pathlib import Path

import pytest
from helpers.data_command import KNOWN_AS_REWRITE, OWN, TWO, ZSRE, own, write
from helpers.fact_records import COUNTERFACT
from helpers.models import FACTS, ZERO_WIDTH_SPACE
from helpers.page_commands import ROOT, blocks, commands
from hypothesis import HealthCheck, given, settings, strategies as st

import causalcone as cc
from causalcone.runners.demo.model import demo_world
from causalcone.runners.facts import data as fact_data
from causalcone.runners.facts.files import SkippedRecords
from causalcone.runners.facts.formats.flat import FIELDS
from causalcone.runners.facts.schemas import SCHEMAS, Reading

# --- files ---


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("schema", TWO)
def test_facts_of_a_file_are_those_that_load_facts_reads(schema, suffix, convert, tmp_path):
    path = write(tmp_path / f"in{suffix}", TWO[schema])
    code, printed, error, found = convert(path)
    assert (code, error) == (0, "")
    assert found == cc.load_facts(path)
    assert len(found) == 2
    assert "facts: 2" in printed


def test_zsre_takes_its_form_and_seed(convert, tmp_path):
    path = write(tmp_path / "in.json", [{**ZSRE, "answers": [f"answer {k}"]} for k in range(30)])
    for number, options in enumerate(({"zsre_form": "meng"}, {"seed": 1}, {"seed": 2, "limit": 5})):
        flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
        _, _, _, found = convert(path, *flags, *["--overwrite"] * (number > 0))
        assert found == cc.load_facts(path, **options)


def test_the_summary_counts(convert, tmp_path):
    records = [
        *TWO["counterfact"],
        {**COUNTERFACT, "case_id": 19, "paraphrase_prompts": [], "requested_rewrite": KNOWN_AS_REWRITE},
    ]
    code, printed, _, _ = convert(write(tmp_path / "in.json", records))
    assert code == 0
    assert printed.splitlines()[:6] == [
        "schema: CounterFact (requested_rewrite, case_id)",
        "recognised by: keys requested_rewrite of 3 of 3 records",
        "facts: 3",
        "of them with target_new 2, paraphrase_prompts 2, neighborhood_prompts 3, attribute_prompts 3, "
        "generation_prompts 3",
        "distinct relations: 2",
        "duplicates of (prompt, subject): 1",
    ]
    assert str(tmp_path / "out" / "facts.jsonl") in printed.splitlines()[6]


def test_quiet_says_nothing(convert, tmp_path):
    assert convert(write(tmp_path / "in.json", own(3)), "--quiet")[:3] == (0, "", "")


def test_the_demo_world(convert):
    code, printed, _, found = convert("demo")
    assert (code, found) == (0, demo_world().facts)
    assert "the demo world" in printed


def test_a_written_file_is_converted_into_itself(convert, run, tmp_path):
    convert(write(tmp_path / "in.json", TWO["counterfact"]))
    out = tmp_path / "out" / "facts.jsonl"
    before = out.read_bytes()
    assert run("data", out, "--out", out, "--overwrite")[0] == 0
    assert out.read_bytes() == before


# --- bad records ---


def test_bad_records_are_listed_and_nothing_is_written(convert, tmp_path):
    records = [own(1)[0], 3, *own(4, bad=[2])[1:], {**OWN, "id": "0"}]
    code, printed, error, found = convert(write(tmp_path / "in.json", records))
    assert (code, printed, found) == (2, "", None)
    assert f"3 records of {tmp_path / 'in.json'} cannot be used" in error
    assert "in.json: record 1 is a number, not an object" in error
    assert "in.json: record 3 (id 2): subject is empty" in error
    assert "in.json: record 5 (id 0): the id '0' was there before" in error
    assert "--skip-bad-facts" in error


def test_bad_records_are_left_out_when_asked(convert, tmp_path):
    path = write(tmp_path / "in.json", own(5, bad=[0, 3]))
    code, printed, error, found = convert(path, "--skip-bad-facts")
    assert (code, [fact.id for fact in found]) == (0, ["1", "2", "4"])
    assert "2 records" in error
    assert "record 0 (id 0): subject is empty" in error
    assert "record 3 (id 3): subject is empty" in error
    assert "facts: 3" in printed


@pytest.mark.parametrize("flags", [[], ["--skip-bad-facts"]])
def test_the_first_twenty_are_listed(flags, convert, tmp_path):
    _, _, error, _ = convert(write(tmp_path / "in.json", own(30, bad=range(25))), *flags)
    listed = [line for line in error.splitlines() if "subject is empty" in line]
    assert len(listed) == 20
    assert "record 19 (id 19)" in listed[-1]
    assert "and 5 more" in error
    assert "25 records" in error


def test_no_fact_is_left(convert, tmp_path):
    code, _, error, found = convert(write(tmp_path / "in.json", own(2, bad=[0, 1])), "--skip-bad-facts")
    assert (code, found) == (2, None)
    assert "record 1 (id 1)" in error
    assert "no fact is left" in error


def test_a_limit_reads_no_further(convert, tmp_path):
    path = write(tmp_path / "in.json", own(9, bad=[1, 5]))
    assert [fact.id for fact in convert(path, "--limit", 1)[3]] == ["0"]
    code, _, error, _ = convert(path, "--limit", 3, "--overwrite")
    assert (code, "record 1" in error, "record 5" in error) == (2, True, False)
    _, _, _, found = convert(path, "--limit", 3, "--overwrite", "--skip-bad-facts")
    assert [fact.id for fact in found] == ["0", "2", "3"]


LINES = st.one_of(
    st.builds(
        lambda k, who: {**OWN, "id": k, "subject": who}, st.integers(0, 5), st.sampled_from(["Bo", "Ek", "", " "])
    ),
    st.sampled_from([None, 3, [], {}, {"id": "x"}, {**OWN, "prompt": "plays"}, {**OWN, "other": 1}]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(LINES, min_size=1, max_size=12), limit=st.none() | st.integers(1, 6))
def test_every_record_is_a_fact_or_a_problem(records, limit, tmp_path):
    path = write(tmp_path / "in.json", [OWN, *records])
    opened = fact_data.open_records(str(path), Reading())
    facts, problems = opened.facts(limit)
    taken = len(facts) + len(problems)
    assert taken == len(records) + 1 or len(facts) == limit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedRecords)
        assert cc.load_facts(path, limit=limit, on_error="skip") == facts
    if problems:
        assert all(problem.startswith(f"{path}: record ") for problem in problems)
    else:
        assert cc.load_facts(path, limit=limit) == facts
    fact_data.write_facts(facts, tmp_path / "out.jsonl")
    assert cc.load_facts(tmp_path / "out.jsonl") == facts


# --- a model ---


def test_facts_are_checked_for_a_model(folder, convert, tmp_path):
    code, _, error, found = convert(folder / "facts.jsonl", "--model", folder / "model")
    assert (code, error, found) == (0, "", list(FACTS))

    long = {**OWN, "id": "long", "prompt": "{} is" + " so" * 70}
    unseen = {**OWN, "id": "unseen", "prompt": "It is {}", "subject": ZERO_WIDTH_SPACE}
    path = write(tmp_path / "in.json", [long, OWN, unseen])
    code, _, error, _ = convert(path, "--model", folder / "model", "--overwrite")
    assert code == 2
    assert "record 0 (id long): fact 'long': prompt and target need" in error
    assert "record 2 (id unseen): fact 'unseen': the subject" in error
    options = ["--model", folder / "model", "--overwrite", "--skip-bad-facts", "--limit", "1"]
    code, _, error, found = convert(path, *options)
    assert (code, [fact.id for fact in found]) == (0, ["a"])
    assert "record 2" not in error


def test_a_vocabulary_that_is_too_small(folder, tokenizer, convert, tmp_path):
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)
    config = json.loads((folder / "model" / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 3}))
    code, _, error, _ = convert(folder / "facts.jsonl", "--model", model)
    assert (code, "outside the model's vocabulary of 3" in error) == (2, True)


def test_the_demo_model(folder, convert, monkeypatch):
    monkeypatch.setattr("causalcone.runners.demo.model.demo_folder", lambda: folder / "model")
    assert convert(folder / "facts.jsonl", "--model", "demo")[0] == 0


def test_models_that_cannot_be_used(folder, tokenizer, convert, tmp_path):
    for model, reason in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "no tokenizer and configuration")):
        code, _, error, found = convert(folder / "facts.jsonl", "--model", model)
        assert (code, str(model) in error, reason in error, found) == (2, True, True, None)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    code, _, error, _ = convert(folder / "facts.jsonl", "--model", tmp_path / "model")
    assert (code, "'bert' is not supported" in error) == (2, True)


# --- the file written ---


def test_a_file_is_replaced_only_when_asked(convert, tmp_path):
    path = write(tmp_path / "in.json", own(3))
    assert convert(path)[0] == 0
    code, _, error, found = convert(path, "--limit", 1)
    assert (code, "--overwrite" in error, len(found)) == (2, True, 3)
    write(path, own(3, bad=[1]))
    code, _, _, found = convert(path, "--overwrite")
    assert (code, len(found)) == (2, 3)
    assert len(convert(path, "--overwrite", "--skip-bad-facts")[3]) == 2


def test_what_cannot_be_written(run, tmp_path, monkeypatch):
    path = write(tmp_path / "in.json", own(3))
    for out, reason in ((tmp_path, "is not a file"), (path / "inside.jsonl", "cannot write")):
        code, _, error = run("data", path, "--out", out, "--overwrite")
        assert (code, reason in error, str(out) in error) == (2, True, True)


def test_a_write_that_fails_leaves_what_was_there(convert, tmp_path, monkeypatch):
    path = write(tmp_path / "in.json", own(3))
    convert(path)

    def full(facts, place):
        place.write_text('{"id": ')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fact_data, "save_facts", full)
    code, _, error, found = convert(path, "--limit", 1, "--overwrite")
    assert (code, "No space left" in error, len(found)) == (2, True, 3)


# --- what is refused ---

REFUSED = {
    "no such file": (["nowhere.json"], "there is no 'nowhere.json'"),
    "no such place": (["./nowhere/facts"], "there is no './nowhere/facts'"),
    "no name": ([""], "give a file of facts"),
    "no JSON": (["bad.txt"], "bad.txt is not JSON"),
    "no facts": (["other.json"], "its first record has the keys 'relation', 'answer'"),
    "split of a file": (["good.json", "--split", "test"], "--split"),
    "configuration of a file": (["good.json", "--dataset-config", "x"], "--dataset-config"),
    "split of the demo world": (["demo", "--split", "test"], "--split"),
    "form": (["good.json", "--zsre-form", "zhu"], "'zhu'; choose from hase, meng"),
    "limit": (["good.json", "--limit", "0"], "--limit"),
    "seed": (["good.json", "--seed", "-1"], "--seed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, convert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.json", own(2))
    write(tmp_path / "other.json", [{"relation": "r", "answer": "x"}])
    (tmp_path / "bad.txt").write_text("not this")
    arguments, reason = REFUSED[case]
    code, _, error, found = convert(*arguments)
    assert (code, found) == (2, None)
    assert reason in error


# --- the help and the page ---


def test_help_has_examples(run):
    code, printed, _ = run("data", "--help")
    assert (code, "causalcone data counterfact.json --out" in printed) == (0, True)


def test_the_lines_in_the_documentation_are_facts(convert, tmp_path):
    lines = "".join(blocks("docs/data.md", "json"))
    assert lines.count("\n") == 2
    (tmp_path / "in.jsonl").write_text(lines, encoding="utf-8")
    assert convert(tmp_path / "in.jsonl")[0] == 0
    assert (tmp_path / "out" / "facts.jsonl").read_text(encoding="utf-8") == lines


def test_the_table_in_the_documentation_is_reported_as_there(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (content,), (report,) = blocks("docs/data.md", "csv"), blocks("docs/data.md", "text")
    Path("mine.csv").write_text(content)
    (arguments,) = [arguments for arguments in commands("docs/data.md") if {"mine.csv", "--out"} <= {*arguments}]
    assert run(*arguments) == (0, report, "")
    first, second = cc.load_facts("mine.jsonl")
    assert (first.prompt, first.target_new) == ("Where does {} live?", "Lima")
    assert (second.text, second.target_true) == ("The home of Bo Ek is", "Rome")


def test_the_documentation_names_the_columns_and_formats_that_are_read():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = text.partition("## Columns")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert named >= {name for name, (_, _, usual) in FIELDS.items() for name in (name, *usual.split())}
    formats = text.partition("## Formats")[2].partition("### zsRE")[0]
    assert set(re.findall(r"`(\w+)`", formats)) >= {
        key for each in SCHEMAS for mark in each.marks for key in mark.split()
    }
