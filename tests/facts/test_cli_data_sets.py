"""``causalcone data`` of data sets, those of the hub and those in a folder: their rows are read as a file's records."""

import sys
from types import ModuleType

import pytest
from helpers.data_command import KNOWN_AS_REWRITE, TWO, ZSRE, own, write
from helpers.fact_records import COUNTERFACT

import causalcone as cc


class Rows:
    """Rows of a data set, which counts those that are taken."""

    def __init__(self, rows):
        self.rows, self.taken = rows, 0

    def __iter__(self):
        for row in self.rows:
            self.taken += 1
            yield row


@pytest.fixture
def hub(monkeypatch):
    """Data sets by name, in place of the hub's, and what was asked of it."""
    sets, asked = {}, []

    def load_dataset(name, config, **options):
        asked.append((name, config, options))
        if name not in sets:
            raise FileNotFoundError("there is no such data set")
        return sets[name]

    package = ModuleType("datasets")
    package.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    return sets, asked


def test_data_sets_need_their_package(convert, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, error, _ = convert("someone/counterfact")
    assert (code, "causalcone[datasets]" in error) == (2, True)


@pytest.mark.parametrize("schema", TWO)
def test_a_data_set_is_read_like_a_file(schema, convert, hub, tmp_path):
    sets, asked = hub
    columns = {key: None for record in TWO[schema] for key in record}
    sets["someone/facts"] = Rows([{**columns, **record} for record in TWO[schema]])
    code, printed, error, found = convert("someone/facts", "--split", "test", "--dataset-config", "small")
    assert (code, error) == (0, "")
    assert found == cc.load_facts(write(tmp_path / "in.json", TWO[schema]))
    assert asked == [("someone/facts", "small", {"split": "test", "streaming": True})]
    assert "data set someone/facts, small, split test" in printed


def test_nulls_of_a_data_set_are_what_a_record_lacks(convert, hub):
    rewrite = {**KNOWN_AS_REWRITE, "target_new": {"str": None, "id": None}, "relation_id": None}
    row = {**dict.fromkeys(COUNTERFACT), "requested_rewrite": rewrite}
    lacking = {**row, "requested_rewrite": {**rewrite, "subject": None}}
    hub[0]["facts"] = [row, lacking]
    code, _, error, found = convert("facts", "--skip-bad-facts")
    assert (code, found) == (0, [cc.Fact("0", "{} lies in", "Rome", "Italy")])
    assert "data set facts, split train: record 1: requested_rewrite.subject is missing" in error


def test_a_limit_takes_no_more_rows_of_a_data_set(convert, hub):
    hub[0]["facts"] = rows = Rows(own(50, bad=[1]))
    assert len(convert("facts", "--limit", 3, "--skip-bad-facts")[3]) == 3
    assert rows.taken == 4


def test_false_targets_of_a_data_set_do_not_depend_on_the_limit(convert, hub):
    hub[0]["zsre"] = [{**ZSRE, "answers": [f"answer {k}"]} for k in range(30)]
    whole = convert("zsre", "--seed", 3)[3]
    assert convert("zsre", "--seed", 3, "--limit", 4, "--overwrite")[3] == whole[:4]
    assert not {fact.target_new for fact in whole[:4]} <= {fact.target_true for fact in whole[:4]}
    hub[0]["zsre"] = rows = Rows(hub[0]["zsre"])
    convert("zsre", "--zsre-form", "meng", "--limit", 4, "--overwrite")
    assert rows.taken == 4


UNKNOWN = {
    "flat": ["relation", "prompt", "subject", "target_true", "target_false"],
    "answers of another kind": ["id", "context", "question", "answers"],
    "text": ["text"],
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_data_set_of_no_known_schema(kind, convert, hub):
    hub[0]["facts"] = [dict.fromkeys(UNKNOWN[kind], "{}")]
    code, _, error, found = convert("facts", "--skip-bad-facts")
    assert (code, found) == (2, None)
    assert f"its columns are {', '.join(UNKNOWN[kind])}. Supported are CounterFact" in error


def test_data_sets_that_cannot_be_read(convert, hub):
    hub[0]["empty"] = []
    for name, reason in (("gone", "there is no such data set"), ("empty", "is empty")):
        code, _, error, _ = convert(name)
        assert (code, name in error, reason in error) == (2, True, True)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("schema", TWO)
def test_a_folder_of_a_data_set(schema, suffix, convert, tmp_path):
    pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
    write(tmp_path / "data" / f"train{suffix}", TWO[schema])
    code, _, error, found = convert(tmp_path / "data")
    assert (code, error) == (0, "")
    assert found == cc.load_facts(write(tmp_path / "in.json", TWO[schema]))
    code, _, error, _ = convert(tmp_path / "data", "--split", "other", "--overwrite")
    assert (code, "'other'" in error) == (2, True)


def test_rows_of_a_folder_that_lack_something(convert, tmp_path):
    pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
    short = {"case_id": 18, "requested_rewrite": KNOWN_AS_REWRITE}
    write(tmp_path / "data" / "train.parquet", [COUNTERFACT, short])
    code, _, _, found = convert(tmp_path / "data")
    assert (code, found) == (0, cc.load_facts(write(tmp_path / "in.json", [COUNTERFACT, short])))
