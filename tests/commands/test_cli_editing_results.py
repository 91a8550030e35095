"""``causalcone edit``: what it writes is what the editor computes, and what is left when it ends early."""

import dataclasses
import json
import sys
from collections import Counter

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from helpers.edit_command import CONTEXTS, FAST, arguments, assert_same, read, run_json, write_inputs
from helpers.editing_cases import FULL
from transformers import PreTrainedTokenizerFast

import causalcone as cc
from causalcone.analysis import mean_scores, read_edits, read_metrics, read_probes, read_texts, scores
from causalcone.engine.edit.deltas.delta import load_delta
from causalcone.engine.edit.moments import moments as moments_module
from causalcone.engine.edit.scoring.tables import edit_batch
from causalcone.runners.commands.app import main
from causalcone.runners.edits import study as edit_study
from causalcone.runners.show.edit_tables import failed_lines


@pytest.fixture(scope="module")
def user(folder):
    """What a user has."""
    return write_inputs(folder)


@pytest.fixture
def editor(user):
    """An editor as the command makes one."""
    moments = cc.Moments.load(user / "moments.safetensors")
    return cc.Editor.from_pretrained(str(user / "model"), moments, contexts=cc.Contexts(**CONTEXTS))


def computed(editor, requests, chosen, layers="all", **asked):
    """The tables of what an editor computes by methods with windows and hyperparameters, and the edits."""
    edits, probes, metrics = [], [], []
    for method, window, hparams in chosen:
        own = [edit for batch in editor.batches(requests, method, layers, window, hparams) for edit in batch]
        found = editor.evaluate(own, **asked)
        edits += found.edits
        probes.append(read_probes(found.probes))
        metrics.append(read_metrics(found.metrics))
    return (read_edits(edit_batch(edits)), pl.concat(probes), pl.concat(metrics)), edits


METHODS = (
    ("rome", 1, cc.RomeHparams(steps=3, stop_loss=None)),
    ("memit", 3, cc.MemitHparams(steps=3, clamp=2.0, stop_loss=None)),
    ("finetune", 1, cc.FinetuneHparams(steps=3, stop_loss=None)),
    ("finetune", 2, cc.FinetuneHparams(steps=3, stop_loss=None)),
)


def test_edits_and_scores_are_those_that_the_editor_computes(user, editor, tmp_path, run):
    out = tmp_path / "out"
    several = ["--method", "memit:3", "--method", "finetune", "--method", "finetune:2"]
    changes = ["--set", "steps=3", "--set", "stop_loss=never", "--set", "memit.clamp=2"]
    more = ["--essence", "--accuracy", "--keep-deltas", "--plot"]
    code, printed, error = run(*arguments(user, out, *several, *changes, *more))
    assert (code, error) == (0, "")
    requests = editor.requests(FULL, filtered=False)
    expected, edits = computed(editor, requests, METHODS, essence=True, accuracy=True)
    assert_same(read(out), expected)

    for edit in edits:
        name = f"deltas/{edit.method}-{edit.window}/{edit.layer}/{edit.fact_id}.safetensors"
        delta, described = load_delta(out / name)
        assert described["edit_id"] == edit.edit_id
        assert delta.layers == edit.delta.layers
        assert delta.norm == edit.delta.norm
    assert (out / "plots" / "scores.png").stat().st_size > 10_000

    means = mean_scores(scores(*expected)).filter(method="memit", score="essence")
    best = means.sort("mean", descending=True).row(0, named=True)
    table = printed[printed.index("MEMIT of 3 layers: mean scores of 6 facts") :]
    assert f"{best['mean']:.3f}" in next(line for line in table.splitlines() if line.startswith(f"│ {best['layer']} "))
    for part in ("ROME: mean scores", "Fine-tuning of 2 layers", "overall essence", "unedited", "specificity"):
        assert part in printed
    assert "96 edits of 6 facts, 0 failed" in printed
    assert "editing, memit:3: 24/24 edits" in printed


def test_texts_are_tokenized_when_requests_are_made_and_once_more(user, tmp_path, run, monkeypatch):
    """Whatever the number of methods and of batches; the prompt with each of both targets when the request is made."""
    texts, tokenize = Counter(), PreTrainedTokenizerFast.__call__

    def counted(tokenizer, text, **options):
        texts[text] += 1
        return tokenize(tokenizer, text, **options)

    fact = dataclasses.replace(FULL[1], generation_prompts=("Bo said that", "In Rome"))
    cc.save_facts([fact], tmp_path / "facts.jsonl")
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    more = ["--method", "memit:3", "--method", "finetune:2", "--essence", "--generation", *FAST]
    code, _, error = run(*arguments(user, tmp_path / "out", *more, facts=tmp_path / "facts.jsonl", memory="5MB"))
    assert (code, error) == (0, "")
    derived = {fact.text, f"They say. {fact.text}", *fact.paraphrase_prompts, *fact.generation_prompts}
    assert derived <= set(texts)
    assert {text: count for text, count in texts.items() if count > 2 + (text == fact.text)} == {}


def test_names_for_the_keys_of_rome(user, editor, tmp_path, run):
    """Their edits stand beside ROME's own; the summary says which are suspect, and that is in the table."""
    out, start = tmp_path / "out", dataclasses.replace(FULL[0], id="short", subject="B")
    cc.save_facts([start, FULL[1]], tmp_path / "facts.jsonl")
    named = ["--method", "r-rome", "--method", "p-rome", "--set", "steps=2", "--set", "r-rome.clamp=2"]
    options = {"facts": tmp_path / "facts.jsonl", "layers": "1"}
    code, printed, error = run(*arguments(user, out, *named, "--plot", **options))
    assert code == 0, error
    requests = editor.requests([start, FULL[1]], filtered=False)
    chosen = [("rome", 1, cc.RomeHparams(steps=2)), ("r-rome", 1, cc.RomeHparams(steps=2, clamp=2.0, keys="mean"))]
    expected, _ = computed(editor, requests, [*chosen, ("p-rome", 1, cc.RomeHparams(steps=2))], (1,))
    assert_same(read(out), expected)
    edits = expected[0]
    assert edits["method"].unique(maintain_order=True).to_list() == ["rome", "r-rome", "p-rome"]
    assert edits.filter(fact_id="short")["suspect"].str.contains("first token").all()
    for reason, count in Counter(edits["suspect"].drop_nulls()).items():
        assert f"{count} edits are suspect: {reason}" in " ".join(printed.split())
    assert run_json(out)["results"]["suspect"] == Counter(edits["suspect"].drop_nulls())
    assert [each["hparams"]["keys"] for each in run_json(out)["methods"]] == ["published", "mean", "prompt"]
    for title in ("ROME: mean scores", "R-ROME: mean scores", "P-ROME: mean scores"):
        assert title in printed
    code, _, error = run(
        *arguments(user, out, "--set", "keys=prompt", "--overwrite", **{**options, "method": "r-rome"})
    )
    assert (code, "the name stands for" in error) == (2, True)
    code, _, error = run(*arguments(user, out, "--set", "keys=none", "--overwrite", **options))
    assert (code, "choose from published, mean, prompt" in error) == (2, True)


def test_all_facts_in_one_change_of_the_weights(user, editor, tmp_path, run):
    """Whatever number of edits goes together else; the change is kept once for each window."""
    out = tmp_path / "out"
    several = ["--method", "memit:2", "--set", "steps=2", "--set", "memit_joint.clamp=2", "--keep-deltas"]
    code, printed, error = run(*arguments(user, out, *several, method="memit_joint:2", layers="1,2"))
    assert (code, error) == (0, "")
    requests = editor.requests(FULL, filtered=False)
    chosen = [("memit_joint", 2, cc.MemitHparams(steps=2, clamp=2.0)), ("memit", 2, cc.MemitHparams(steps=2))]
    expected, edits = computed(editor, requests, chosen, (1, 2))
    assert_same(read(out), expected)
    assert "Joint MEMIT of 2 layers: mean scores of 6 facts by layer" in printed
    kept = sorted(path.relative_to(out / "deltas").as_posix() for path in (out / "deltas").glob("memit_joint-2/*/*"))
    assert kept == [f"memit_joint-2/{layer}/all.safetensors" for layer in (1, 2)]
    delta, described = load_delta(out / "deltas" / kept[0])
    assert (delta.layers, described["layer"]) == ((0, 1), "1")
    assert delta.norm == pytest.approx(edits[0].delta.norm, rel=1e-9)


def test_everything_that_decides_the_results_is_kept_with_them(user, tmp_path, run):
    out = tmp_path / "out"
    assert run(*arguments(user, out, *FAST, layers="3,1", seed=5, ridge=0.5))[0] == 0
    kept = run_json(out)
    assert kept["status"] == "complete"
    assert (kept["command"], kept["problem"], kept["layers"], kept["seed"]) == ("edit", "error_injection", [3, 1], 5)
    assert kept["methods"] == [{"method": "rome", "window": 1, "hparams": vars(cc.RomeHparams(steps=2))}]
    assert kept["contexts"] == CONTEXTS
    assert kept["moments"]["ridge"] == 0.5
    assert kept["moments"]["tokens"] == {"1": 1280, "3": 1280}
    assert (kept["results"]["edits"], kept["results"]["failed"]) == (12, {})
    for table in ("edits", "probes", "metrics"):
        (part,) = (out / table).glob("*.parquet")
        metadata = json.loads(pq.read_schema(part).metadata[b"causalcone"])
        assert metadata["methods"] == kept["methods"]
        assert metadata["versions"]["torch"] == torch.__version__
    assert read_edits(out / "edits")["layer"].to_list() == [3, 1] * 6


def test_essence_texts_under_noise(user, editor, tmp_path, run):
    out, own = tmp_path / "out", {"problem": "fact_forcing", "method": "finetune", "layers": "1", "sigma": "0.3"}
    assert run(*arguments(user, out, *FAST, "--essence", limit=2, moments=None, **own))[0] == 0
    assert read_metrics(out / "metrics").filter(metric="perplexity").height == 2


def test_what_edited_models_write(user, editor, tmp_path, run):
    out, facts, snippets = tmp_path / "out", tmp_path / "facts.jsonl", tmp_path / "snippets.json"
    known = {"relation_id": "P1", "target_new_id": "Q1"}
    fact = dataclasses.replace(FULL[0], generation_prompts=("Ann Lee is", "Bo is"), **known)
    cc.save_facts([fact], facts)
    texts = [{"text": "Ann Lee plays golf in the city"}]
    snippets.write_text(json.dumps([{"relation_id": "P1", "target_id": "Q1", "samples": texts}]))
    given = arguments(user, out, "--set", "steps=2", "--references", snippets, "--answers", facts=facts, layers="1")
    code, printed, _ = run(*given)
    assert code == 0
    from causalcone.runners.inputs.reference_texts import load_reference_texts

    chosen = [("rome", 1, cc.RomeHparams(steps=2))]
    references = load_reference_texts(snippets)
    asked = {"references": references, "answers": True}
    expected, edits = computed(editor, editor.requests([fact], filtered=False), chosen, (1,), **asked)
    assert_same(read(out), expected)
    written = read_texts(out / "texts")
    assert written.equals(read_texts(editor.evaluate(edits, **asked).texts))
    assert {"rewrite", "paraphrase", "generation"} <= set(written["prompt_kind"])
    entropy = expected[2].filter(metric="generation_entropy").row(0, named=True)
    assert f"│ unedited │ {entropy['pre']:.3f}" in printed
    assert f"│ 1        │ {entropy['post']:.3f}" in printed

    cc.save_facts([dataclasses.replace(fact, target_new_id="Q2")], facts)
    code, _, error = run(*given, "--overwrite")
    assert (code, "Q2" in error) == (2, True)


# --- failures and interruptions ---


def test_edits_that_fail_are_counted(user, tmp_path, run):
    out = tmp_path / "out"
    code, printed, error = run(*arguments(user, out, "--set", "lr=1e38", "--set", "clamp=1e38", layers="0,1"))
    assert code == 0, error
    edits = read_edits(out / "edits")
    failed = edits.filter(status="failed")
    assert len(failed) > 0
    reason, count = failed["reason"].value_counts().sort("count", descending=True).row(0)
    assert f"{count} edits failed: {reason}" in printed.replace("\n", " ")
    assert f"{len(failed)} failed" in printed
    assert sum(run_json(out)["results"]["failed"].values()) == len(failed)


def test_the_commonest_reasons_are_told():
    lines = failed_lines({"rare": 1, "often": 9, "a": 2, "b": 2, "c": 1})
    assert lines == [
        "9 edits failed: often",
        "2 edits failed: a",
        "2 edits failed: b",
        "2 edits failed for 2 other reasons",
    ]
    assert failed_lines({}) == []


@pytest.mark.slow
@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError("the disk is on fire")])
def test_what_was_finished_stays_readable(failure, user, tmp_path, monkeypatch, run):
    whole = tmp_path / "whole"
    assert run(*arguments(user, whole, *FAST))[0] == 0
    evaluate, calls = cc.Editor.evaluate, []

    def failing(self, edits, **asked):
        calls.append(edits)
        if len(calls) > 2:
            raise failure
        return evaluate(self, edits, **asked)

    monkeypatch.setattr(cc.Editor, "evaluate", failing)
    monkeypatch.setattr(edit_study, "EDITS_AT_ONCE", 8)  # of two facts
    out = tmp_path / "out"
    given = arguments(user, out, *FAST)
    if failure is KeyboardInterrupt:
        code, printed, _ = run(*given)
        assert (code, f"finished by now is in {out / 'edits'}" in printed) == (130, True)
    else:
        monkeypatch.setattr(sys, "argv", ["causalcone", *map(str, given)])
        with pytest.raises(RuntimeError, match="fire"):
            main()
    assert run_json(out)["status"] == "stopped"
    edits = read(whole)[0].head(16)
    for found, expected in zip(read(out), read(whole), strict=True):
        expected = expected.join(edits, on="edit_id", how="semi", maintain_order="left")
        assert found["edit_id"].to_list() == expected["edit_id"].to_list()
    assert scores(*read(out)[:2])["rewrite"].null_count() == 0


def test_a_folder_is_not_overwritten_unasked(user, tmp_path, run):
    out, one = tmp_path / "out", {"layers": "1", "limit": 1}
    assert run(*arguments(user, out, *FAST, "--keep-deltas", **one))[0] == 0
    before = read(out)
    code, _, error = run(*arguments(user, out, *FAST, model="nowhere", **one))
    assert (code, "--overwrite" in error) == (2, True)
    assert_same(read(out), before)
    assert run(*arguments(user, out, *FAST, "--overwrite", **{**one, "layers": "2"}))[0] == 0
    assert read_edits(out / "edits")["layer"].to_list() == [2]
    assert not (out / "deltas").exists()


def test_a_study_factorises_each_moment_once_however_few_are_kept(user, tmp_path, run, monkeypatch):
    """Where all are kept, edits come in batches of few."""
    factorised, factorise = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: factorised.append(1) or factorise(matrix))
    monkeypatch.setattr(edit_study, "EDITS_AT_ONCE", 8)
    batches, jobs = edit_study.EditStudy._edits, []
    monkeypatch.setattr(
        edit_study.EditStudy, "_edits", lambda self, *more: jobs.append(len(more[0])) or batches(self, *more)
    )
    methods = {"method": "rome", "layers": "0,1,2"}
    for room, sizes in ((2**32, [2, 2, 2]), (1, [6])):
        monkeypatch.setattr(moments_module, "_FACTOR_BYTES", room)
        factorised.clear()
        jobs.clear()
        assert run(*arguments(user, tmp_path / "out", *FAST, "--overwrite", **methods))[0] == 0
        assert (len(factorised), jobs[1:]) == (3, sizes), "the first job is the check of all"


def test_help_has_examples(run):
    code, printed, _ = run("edit", "--help")
    assert (code, "causalcone edit --model" in printed) == (0, True)
