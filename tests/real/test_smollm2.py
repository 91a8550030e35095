"""A real pretrained model, where its package is installed: numbers are those of plain hooks, an edit changes what it
writes."""

import polars as pl
import pytest
import torch
from oracles import tracing as oracle
from transformers import AutoModelForCausalLM, AutoTokenizer

import causalcone as cc
from causalcone.analysis import read_traces
from causalcone.engine.run.model_files import model_place
from causalcone.runners.real.relations import real_facts

NAME = "smollm2"


pytestmark = pytest.mark.real

FACTS = [
    cc.Fact("inside", "The capital of {} is", "France", "Paris", "Rome"),
    cc.Fact("first", "{} is located in the city of", "The Eiffel Tower", "Paris", "Rome"),
    cc.Fact("longer", "The mother tongue of {} is", "Danielle Darrieux", "French", "Russian"),
]


@pytest.fixture(scope="module")
def place():
    """The folder of the weights that were read from the GGUF file."""
    return model_place(NAME)


@pytest.fixture(scope="module")
def tracer():
    return cc.Tracer.from_pretrained(NAME)


@pytest.fixture(scope="module")
def model(place):
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(place):
    return AutoTokenizer.from_pretrained(place)


def test_known_answers(tracer):
    (known,) = tracer.trace(FACTS[:1], [("mlp", 1)], tokens="last", samples=1).slice(0, 1).to_pylist()
    assert known["p_clean"] > 0.7


@pytest.mark.parametrize(
    ("facts", "tokens", "states"), [(FACTS, "last", [("mlp", 5)]), (FACTS[:1], "subject", [("hidden", 1)])]
)
def test_tracing_is_what_plain_hooks_give(tracer, model, tokenizer, facts, tokens, states):
    options = {"states": states, "tokens": tokens, "samples": 2, "sigma": 0.3}
    rows = oracle.trace(model, tokenizer, facts, **options)
    found = read_traces(tracer.trace(facts, **options)).to_dicts()
    assert len(found) == len(rows)
    for ours, theirs in zip(found, rows, strict=True):
        assert (ours["fact_id"], ours["layer"], ours["token"]) == (theirs["fact_id"], theirs["layer"], theirs["token"])
        for column in ("p_clean", "p_corrupted", "p_patched"):
            assert ours[column] == pytest.approx(theirs[column], abs=1e-5)
    assert max(abs(row["p_patched"] - row["p_corrupted"]) for row in rows) > 0.01


def test_an_edit_changes_what_the_model_writes(model, tokenizer):
    def written():
        ids = tokenizer(FACTS[0].text, return_tensors="pt")
        with torch.no_grad():
            said = model.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        return tokenizer.decode(said[0, ids["input_ids"].shape[1] :])

    texts = [f"{fact.text} {fact.target_true}." for fact in real_facts()[::3]]
    moments = cc.Moments.collect(model, tokenizer, texts, layers=[5], tokens="all", source="facts")
    editor = cc.Editor(model, tokenizer, moments)
    (edit,) = editor.rome(editor.requests(FACTS[:1], filtered=False), [5])
    before = written()
    with cc.applied(model, edit.delta):
        after = written()
    assert "Paris" in before
    assert "Rome" in after
    assert written() == before


def test_the_check_counts_what_the_model_gives_itself(model, tokenizer, run):
    """Facts whose answer plain greedy decoding gives, of those with the subject first and inside."""
    code, printed, _ = run("data", NAME, "--limit", "12", "--model", NAME, "--check")
    counts = {True: [], False: []}
    for fact in real_facts()[:12]:
        ids = tokenizer(fact.text, return_tensors="pt")
        answer = tokenizer(f" {fact.target_true}")["input_ids"]
        with torch.no_grad():
            said = model.generate(
                **ids, max_new_tokens=len(answer), do_sample=False, pad_token_id=tokenizer.eos_token_id
            )
        counts[fact.prompt.startswith("{}")].append(said[0, ids["input_ids"].shape[1] :].tolist() == answer)
    first, inside = counts[True], counts[False]
    assert code == 0
    assert (
        f"answers that the model gives itself: {sum(first) + sum(inside)} of 12 ({sum(first)} of {len(first)} whose "
        f"subject begins the prompt, {sum(inside)} of {len(inside)} whose subject stands inside it)"
    ) in printed
    assert 0 < sum(inside) < len(inside)


@pytest.mark.long
def test_the_demo(tmp_path, run):
    """A map first, then a sweep whose summary says what its tables have, and a page; a second run only shows."""
    code, printed, _ = run("demo", "--out", tmp_path / "out", "--facts", "2", "--edits", "1")
    assert code == 0
    assert "The capital of France is -> Paris (the likeliest token)" in printed
    traces = pl.read_parquet(tmp_path / "out" / "traces" / "restore" / "*.parquet")
    assert traces["fact_id"].n_unique() == 2
    assert traces["p_clean"].min() > 0.05
    edits = pl.read_parquet(tmp_path / "out" / "edits" / "**" / "*.parquet")
    assert edits["layer"].sort().to_list() == [2, 8, 14, 20, 27]
    assert "Error injection: mean rewrite score of 1 fact by layer" in printed
    assert (tmp_path / "out" / "report.html").stat().st_size > 100_000
    again = run("demo", "--out", tmp_path / "out", "--facts", "2", "--edits", "1")
    assert again[0] == 0
    assert "complete after" in again[1]
