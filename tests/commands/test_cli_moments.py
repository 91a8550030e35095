"""``causalcone moments``: what it writes is what the engine collects, from every kind of text; and what it refuses."""

import json
import sys
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.command_line import running_text
from helpers.models import gpt2

import causalcone as cc
from causalcone.engine.edit.moments import collect as collecting

TEXTS = running_text()


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(TEXTS) + "\n")
    return path


@pytest.fixture
def user(folder, tokenizer):
    """The folder's model, read again."""
    return cc.Tracer.from_pretrained(str(folder / "model")).session.model, tokenizer


def collect(run, folder, tmp_path, *options):
    """The exit code, what was printed, and the moments, where there are some."""
    out = tmp_path / "moments.safetensors"
    code, printed, error = run("moments", "--model", folder / "model", "--out", out, *options)
    return code, printed, error, cc.Moments.load(out) if out.exists() else None


def same(found, expected):
    assert found.tokens == expected.tokens
    assert found.layers == expected.layers
    for layer in expected.layers:
        torch.testing.assert_close(found.matrices[layer], expected.matrices[layer], rtol=1e-5, atol=1e-6)


def test_moments_are_those_that_the_engine_collects(folder, texts, user, tmp_path, run):
    code, printed, error, found = collect(run, folder, tmp_path, "--texts", texts)
    assert (code, error) == (0, "")
    same(found, cc.Moments.collect(*user, TEXTS))
    assert found.source == str(texts)
    found.check(user[0], range(4))
    assert "second moments of 4 layers over 1,280 tokens" in printed
    assert "1280/1280 tokens" in printed
    assert [path.name for path in tmp_path.iterdir() if "moments" in path.name] == ["moments.safetensors"]


def test_with_the_model_alone_it_writes_the_texts_itself(folder, user, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAUSALCONE_CACHE", str(tmp_path / "cache"))
    code, printed, error = run("moments", "--model", folder / "model")
    assert (code, error) == (0, "")
    assert "second moments of 4 layers over 1,280 tokens" in printed
    found = cc.Moments.load(tmp_path / "moments.safetensors")
    assert found.source == "text sampled from the model"
    same(found, cc.Moments.collect(*user))
    code, _, error = run("moments", "--model", folder / "model", "--tokens", "all", "--overwrite")
    assert (code, "without end" in error) == (2, True)


def test_layers_tokens_and_length(folder, texts, user, tmp_path, run):
    options = ["--layers", "1,3", "--tokens", "all", "--length", "7", "--dtype", "float64", "--quiet"]
    code, printed, _, found = collect(run, folder, tmp_path, "--texts", texts, *options)
    assert (code, printed) == (0, "")
    same(found, cc.Moments.collect(gpt2(dtype=torch.float32).double(), user[1], TEXTS, (1, 3), "all", length=7))


def json_lines(rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_text(content)


KINDS = {
    "strings": ({"a.jsonl": json_lines(TEXTS)}, []),
    "objects": ({"a.json": json_lines({"id": 1, "text": text} for text in TEXTS)}, []),
    "a column": ({"a.jsonl": json_lines({"body": text} for text in TEXTS)}, ["--column", "body"]),
    "parquet": ({"a.parquet": pa.table({"text": [*TEXTS[:5], None, "", *TEXTS[5:]], "id": range(82)})}, []),
    "another suffix": ({"a.raw": "\r\n".join(TEXTS)}, []),
    "a folder": (
        {
            "texts/b.jsonl": json_lines(TEXTS[20:50]),
            "texts/a.txt": "\n".join(TEXTS[:20]),
            "texts/c.parquet": pa.table({"text": TEXTS[50:]}),
            "texts/readme.md": "no text of these",
        },
        [],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_every_kind(kind, folder, user, tmp_path, run):
    files, options = KINDS[kind]
    for name, content in files.items():
        write(tmp_path / name, content)
    place = tmp_path / next(iter(files)).split("/")[0]
    code, _, _, found = collect(run, folder, tmp_path, "--texts", place, *options, "--quiet")
    assert code == 0
    same(found, cc.Moments.collect(*user, TEXTS))


def test_an_interrupted_collection_goes_on(folder, user, tmp_path, monkeypatch, run):
    monkeypatch.setattr(collecting, "MAX_ROWS_CPU", 64)
    path, kept = tmp_path / "texts.jsonl", tmp_path / "moments.safetensors.partial"
    path.write_text(json_lines(TEXTS[:50]) + '{"text": "cut of\n')
    code, _, error, found = collect(run, folder, tmp_path, "--texts", path, "--tokens", "all", "--quiet")
    assert (code, "line 51" in error, found, kept.exists()) == (2, True, None, True)

    path.write_text(json_lines(TEXTS))
    passes = []
    whole = collecting._run
    monkeypatch.setattr(collecting, "_run", lambda *given: (passes.append(1), whole(*given)))
    code, printed, _, found = collect(run, folder, tmp_path, "--texts", path, "--tokens", "all")
    assert (code, f"going on with {kept}" in printed, kept.exists()) == (0, True, False)
    resumed = len(passes)
    expected = cc.Moments.collect(*user, TEXTS, tokens="all")
    assert found.tokens == expected.tokens
    assert 0 < resumed < (len(passes) - resumed) / 2
    for layer in range(4):
        torch.testing.assert_close(found.matrices[layer], expected.matrices[layer])


def test_a_collection_that_is_kept_elsewhere_must_be_of_the_same_texts(folder, texts, tmp_path, monkeypatch, run):
    monkeypatch.setattr(collecting, "MAX_ROWS_CPU", 64)
    kept, broken = tmp_path / "kept", tmp_path / "other.jsonl"
    broken.write_text(json_lines(running_text(seed=1)) + "{\n")
    options = ["--tokens", "all", "--resume", kept]
    assert collect(run, folder, tmp_path, "--texts", broken, *options)[0] == 2
    code, _, error, _ = collect(run, folder, tmp_path, "--texts", texts, *options)
    assert (code, str(kept) in error, "delete it" in error) == (2, True, True)


def test_too_few_tokens_are_told(folder, texts, tmp_path, run):
    code, _, error, found = collect(run, folder, tmp_path, "--texts", texts, "--tokens", "100", "--quiet")
    assert (code, found.tokens[0]) == (0, 100)
    assert "too few for keys of width 128" in error
    code, _, error, _ = collect(run, folder, tmp_path, "--texts", texts, "--tokens", "90000", "--overwrite")
    assert (code, "ended after" in error) == (0, True)


def test_a_file_is_replaced_only_when_asked(folder, texts, tmp_path, run):
    assert collect(run, folder, tmp_path, "--texts", texts, "--layers", "0", "--quiet")[0] == 0
    code, _, error, found = collect(run, folder, tmp_path, "--texts", texts, "--layers", "1")
    assert (code, "--overwrite" in error, found.layers) == (2, True, (0,))
    assert collect(run, folder, tmp_path, "--texts", texts, "--layers", "1", "--overwrite")[3].layers == (1,)


REFUSED = {
    "two kinds": (["--texts", "good.txt", "--dataset", "x"], "one of the two"),
    "configuration alone": (["--texts", "good.txt", "--dataset-config", "x"], "--dataset"),
    "nowhere": (["--texts", "nowhere.txt"], "nowhere.txt"),
    "empty folder": (["--texts", "empty"], "holds no texts"),
    "no tokens": (["--texts", "blank.txt"], "no tokens"),
    "another encoding": (["--texts", "latin.txt"], "latin.txt: line 2 is not UTF-8"),
    "no JSON": (["--texts", "bad.jsonl"], "bad.jsonl is not JSON lines: line 2"),
    "another field": (["--texts", "fields.jsonl"], "line 1 has no text 'text'"),
    "another column": (["--texts", "columns.parquet"], "no column 'text' of texts, but body"),
    "numbers": (["--texts", "columns.parquet", "--column", "id"], "no column 'id' of texts"),
    "no Parquet": (["--texts", "bad.parquet"], "bad.parquet is not Parquet"),
    "layers": (["--texts", "good.txt", "--layers", "first"], "first"),
    "layer": (["--texts", "good.txt", "--layers", "4"], "0 to 3"),
    "tokens": (["--texts", "good.txt", "--tokens", "many"], "many"),
    "no token": (["--texts", "good.txt", "--tokens", "0"], "positive"),
    "length": (["--texts", "good.txt", "--length", "65"], "1 to 64"),
    "dtype": (["--texts", "good.txt", "--dtype", "int8"], "int8"),
    "memory": (["--texts", "good.txt", "--memory", "1KiB"], "MiB"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, folder, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.txt", "\n".join(TEXTS))
    write(tmp_path / "blank.txt", " \n\n")
    (tmp_path / "latin.txt").write_bytes(b"fine\nna\xefve\n")
    write(tmp_path / "bad.jsonl", '"fine"\n{"text": 1\n')
    write(tmp_path / "fields.jsonl", json_lines([{"body": "x"}]))
    write(tmp_path / "columns.parquet", pa.table({"body": TEXTS, "id": range(len(TEXTS))}))
    write(tmp_path / "bad.parquet", "text")
    (tmp_path / "empty").mkdir()
    flags, reason = REFUSED[case]
    code, _, error, found = collect(run, folder, tmp_path, *flags)
    assert (code, found) == (2, None)
    assert reason in error
    assert "Traceback" not in error


def test_out_must_be_a_file_that_can_be_written(folder, texts, tmp_path, run):
    arguments = ["moments", "--model", folder / "model", "--texts", texts, "--out"]
    for out, reason in ((tmp_path, "is a folder"), (texts / "inside", "cannot write")):
        code, _, error = run(*arguments, out)
        assert (code, reason in error) == (2, True)


# --- data sets ---


def test_data_sets_need_their_package(folder, tmp_path, monkeypatch, run):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, error, _ = collect(run, folder, tmp_path, "--dataset", "wikitext")
    assert (code, "causalcone[datasets]" in error) == (2, True)


def test_data_sets_are_read_as_they_stream(folder, user, tmp_path, monkeypatch, run):
    asked = []

    def load_dataset(name, config, **options):
        asked.append((name, config, options))
        if name == "gone":
            raise FileNotFoundError("there is no such data set")
        return [{"body": text, "empty": ""} for text in TEXTS]

    package = ModuleType("datasets")
    package.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    chosen = ["--dataset", "wiki", "--dataset-config", "small", "--split", "test"]
    code, _, _, found = collect(run, folder, tmp_path, *chosen, "--column", "body", "--quiet")
    assert (code, found.source) == (0, "data set wiki, small, split test")
    same(found, cc.Moments.collect(*user, TEXTS))
    assert asked == [("wiki", "small", {"split": "test", "streaming": True})]
    for flags, reason in (([], "no column 'text', but body, empty"), (["--dataset", "gone"], "no such data set")):
        code, _, error, _ = collect(run, folder, tmp_path, *chosen, *flags, "--overwrite")
        assert (code, reason in error) == (2, True)


def test_a_folder_of_a_data_set(folder, user, tmp_path, run):
    pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
    write(tmp_path / "data" / "train.jsonl", json_lines({"text": text} for text in TEXTS))
    code, _, _, found = collect(run, folder, tmp_path, "--dataset", tmp_path / "data", "--quiet")
    assert code == 0
    same(found, cc.Moments.collect(*user, TEXTS))


def test_help_has_examples(run):
    code, printed, _ = run("moments", "--help")
    assert (code, "causalcone moments --model" in printed) == (0, True)
