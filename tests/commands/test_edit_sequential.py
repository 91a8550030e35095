"""``causalcone edit --sequential``: what it writes is what a sequence of the editor makes, and after any end, a ``kill
-9`` as well, the same command comes to the same tables."""

import contextlib
import io
import json
import multiprocessing
import random
import shutil
import signal
import sys
import time

import polars as pl
import pytest
from helpers.compare import assert_table_close
from helpers.edit_command import CONTEXTS, arguments, run_json, write_inputs
from helpers.editing_cases import FULL

import causalcone as cc
from causalcone.analysis import health, read_checkpoints, sequence_scores
from causalcone.engine.errors import ExperimentError
from causalcone.engine.schemas import CHECKPOINT_SCHEMA, SEQUENCE_SCHEMA
from causalcone.runners.commands.app import main
from causalcone.runners.facts.files import save_facts

METHODS = {"memit-seq-2": 4, "finetune-2": 3}
"""Folders of the two sequences, with their steps."""
TABLES = ("sequence", "checkpoints")


@pytest.fixture(scope="module")
def user(folder):
    """What a user has."""
    return write_inputs(folder)


def sequential(user, out, *flags, **changes):
    """Six facts in batches of two by MEMIT and by fine-tuning, measured after four edits and at the end."""
    changes = {"method": "memit-seq:2", "layers": "2", "batch": 2, "checkpoint": 4, "sample": 3, **changes}
    settings = [part for name, steps in METHODS.items() for part in ("--set", f"{name[:-2]}.steps={steps}")]
    return arguments(user, out, "--method", "finetune:2", *settings, "--sequential", "--quiet", *flags, **changes)


@pytest.fixture(scope="module")
def whole(user, tmp_path_factory):
    """The folder of such a study, carried out in a process of its own."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert ended(begun(user, out)) == 0
    return out


def command(arguments):
    sys.argv = ["causalcone", *map(str, arguments)]
    with contextlib.redirect_stderr(io.StringIO()):
        main()


def begun(user, out, how="fork"):
    """The command in a copy of this process, which has imported what takes seconds, or in a new one (``"spawn"``)."""
    process = multiprocessing.get_context(how).Process(target=command, args=(sequential(user, out),))
    process.start()
    return process


def ended(process):
    process.join()
    return process.exitcode


def tables(out):
    """Rows that do not depend on the clock."""
    found = {name: sorted((out / name).rglob("*.parquet")) for name in TABLES}
    return {name: pl.concat(map(pl.read_parquet, files)).drop("seconds", strict=False) for name, files in found.items()}


def assert_same_as(out, whole, within=1e-6):
    found, expected = tables(out), tables(whole)
    for name, table in found.items():
        assert_table_close(table, expected[name], within)
    assert sorted(files(out)) == sorted(files(whole))


def files(out):
    return [str(path.relative_to(out)) for name in (*TABLES, "batches") for path in (out / name).rglob("part-*")]


def test_tables_have_a_row_for_each_edit_and_metric(whole):
    sequence, checkpoints = tables(whole).values()
    assert sequence.columns == [name for name in SEQUENCE_SCHEMA.names if name != "seconds"]
    assert checkpoints.columns == CHECKPOINT_SCHEMA.names
    each = [(number // 2, number, fact.id) for number, fact in enumerate(FULL)]
    for method in ("memit-seq", "finetune"):
        rows = sequence.filter(method=method)
        assert rows.select("batch", "position", "fact_id").rows() == each
        assert rows["status"].unique().to_list() == ["done"]
        scored = checkpoints.filter(method=method).select("edits", "group", "fact_id").unique()
        for edits, sample in ((4, 2), (6, 3)):  # of two there are two, of four three are drawn
            newest, earlier = (set(scored.filter(edits=edits, group=of)["fact_id"]) for of in ("newest", "earlier"))
            assert newest == {fact.id for fact in FULL[edits - 2 : edits]}
            assert len(earlier) == sample
            assert earlier <= {fact.id for fact in FULL[: edits - 2]}
    assert checkpoints.filter(group="model")["fact_id"].null_count() == checkpoints.filter(group="model").height
    kept = run_json(whole)
    assert (kept["status"], kept["results"]["edits"], kept["sequence"]["batch"]) == ("complete", 6, 2)


def test_numbers_are_those_of_the_editors_sequence(user, whole):
    moments = cc.Moments.load(user / "moments.safetensors")
    editor = cc.Editor.from_pretrained(str(user / "model"), moments, contexts=cc.Contexts(**CONTEXTS))
    requests = editor.requests(FULL, "error_injection", filtered=False)
    sequence = editor.sequence(requests, "memit-seq", [2], 2, cc.MemitHparams(steps=4), batch=2)
    made = [edit for batch in sequence for edit in batch.edits]
    found = tables(whole)["sequence"].filter(method="memit-seq")
    assert found["delta_norm"].to_list() == pytest.approx([edit.delta_norm for edit in made], rel=1e-4)
    again = editor.sequence(requests, "memit-seq", [2], 2, batch=2)
    for file in sorted((whole / "batches/memit-seq-2").iterdir()):
        again.restore(file)
    assert again.delta.norm == pytest.approx(sequence.delta.norm, rel=1e-4)
    scores = editor.evaluate(sequence.standing(requests[4:]))
    probes = {row["edit_id"]: row["p_post"] for row in scores.probes.to_pylist() if row["prompt_kind"] == "rewrite"}
    last = read_checkpoints(whole / "checkpoints").filter(method="memit-seq", edits=6, group="newest")
    of_fact = dict(last.filter(metric="rewrite_p").select("fact_id", "post").rows())
    for edit in scores.edits:
        assert of_fact[edit.fact_id] == pytest.approx(probes[edit.edit_id], abs=1e-5)
    norm = health(sequence_scores(whole / "checkpoints")).filter(method="memit-seq", edits=6)["relative_norm"].item()
    assert norm == pytest.approx(max(sequence.relative_norms().values()), rel=1e-4)


@pytest.mark.parametrize(("kills", "how"), [(2, "fork"), (10, "spawn")])
def test_killed_at_random_points(kills, how, user, whole, tmp_path):
    """Each kill falls a little after so many files are there."""
    drawn, out = random.Random(kills), tmp_path / "out"
    goals = sorted(drawn.sample(range(len(files(whole)) - 1), kills))
    killed = 0
    for goal in goals:
        process = begun(user, out, how)
        while process.is_alive() and len(files(out)) < goal:
            time.sleep(0.001)
        time.sleep(0.03 * drawn.random())
        process.kill()
        killed += ended(process) == -signal.SIGKILL
    assert killed >= kills - 1  # the last may come after the end
    before = {name: (out / name).stat().st_mtime_ns for name in files(out) if name.startswith("batches")}
    assert killed < kills or len(files(out)) < len(files(whole))
    assert ended(begun(user, out, how)) == 0
    assert_same_as(out, whole)
    assert before == {name: (out / name).stat().st_mtime_ns for name in before}  # none of these is made again


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_it_goes_on_after_every_batch(kept, user, whole, tmp_path, run):
    """Of one method the next batch is there too, but not what was measured after it."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in files(out):
        number = int(name.split("part-")[1].partition(".")[0])
        if number >= kept + ("finetune" in name and not name.startswith("checkpoints")):
            (out / name).unlink()
    assert run(*sequential(user, out))[0] == 0
    assert_same_as(out, whole, 1e-9)


def test_what_is_complete_is_not_made_again(user, whole, run):
    code, _, error = run(*sequential(user, whole))
    assert (code, error) == (0, "")
    assert run_json(whole)["results"]["made_now"] == 0


OTHER = {
    "batch": ([], {"batch": 3}, "sequence.batch: 2 before, 3 now"),
    "seed": ([], {"seed": 4}, "seed: 0 before, 4 now"),
    "fewer facts": ([], {"limit": 4}, "limit: None before, 4 now"),
    "history": (["--no-history"], {}, "sequence.history: None before, False now"),
    "hyperparameter": (["--set", "memit-seq.lr=0.1"], {}, "methods.0.hparams.lr: 0.5 before, 0.1 now"),
    "layer": ([], {"layers": "3"}, "layers: [2] before, [3] now"),
}


@pytest.mark.parametrize("case", OTHER)
def test_another_study_is_refused_by_what_differs(case, user, whole, run):
    flags, changes, difference = OTHER[case]
    before = files(whole)
    code, _, error = run(*sequential(user, whole, *flags, **changes))
    assert code == 2
    assert f"\n  {difference}\n" in error
    assert "or give --overwrite" in error
    assert files(whole) == before


def test_facts_with_other_words_are_refused(user, whole, run):
    saved = (user / "full.jsonl").read_bytes()
    try:
        save_facts([*FULL[:5], cc.Fact.from_record({**FULL[5].record, "target_new": "golf"})], user / "full.jsonl")
        code, _, error = run(*sequential(user, whole))
    finally:
        (user / "full.jsonl").write_bytes(saved)
    assert code == 2
    assert "sequence.facts_fingerprint: " in error


def test_other_versions_are_told_of(user, whole, tmp_path, run):
    kept = run_json(whole)
    kept["versions"]["torch"] = "1.0"
    (whole / "run.json").write_text(json.dumps(kept))
    code, _, error = run(*sequential(user, whole))
    assert code == 0
    assert "was begun with other versions: torch: '1.0' before, " in error


def test_overwriting_begins_anew(user, tmp_path, run):
    out = tmp_path / "out"
    few = {"limit": 2, "batch": 1, "checkpoint": 1}
    assert run(*sequential(user, out, **few))[0] == 0
    assert len(files(out)) == 2 * (2 + 2 + 2)
    code, _, error = run(*sequential(user, out, "--overwrite", **{**few, "batch": 2}))
    assert (code, error) == (0, "")
    assert len(files(out)) == 2 * (1 + 1 + 1)
    assert run_json(out)["results"]["made_now"] == 4
    assert "already holds a run" in run(*arguments(user, out, "--set", "steps=2"))[2]


def test_a_figure_and_tables_are_shown(user, tmp_path, run):
    out = tmp_path / "out"
    shown = [part for part in sequential(user, out, "--plot", limit=2) if part != "--quiet"]
    code, printed, _ = run(*shown)
    assert code == 0
    assert (out / "plots/sequence.png").stat().st_size > 10_000
    assert f"figure {out / 'plots/sequence.png'}" in printed.replace("\n", "")
    assert "Edits in sequence: newest batch" in printed
    assert "sample of all before" not in printed  # of a single batch there is none
    assert "MEMIT-seq-2" in printed


BAD = {
    "no batch": ([], {"batch": 0}, "--batch"),
    "no checkpoint": ([], {"checkpoint": 0}, "--checkpoint"),
    "two layers": ([], {"layers": "1,2"}, "the layers are 1, 2, and a sequence edits one window"),
    "all layers": ([], {"layers": "all"}, "a sequence edits one window"),
    "a prompt": (["--prompt", "Rome is", "--subject", "Rome"], {"facts": None}, "leave out --prompt and --keep-deltas"),
    "kept deltas": (["--keep-deltas"], {}, "leave out --prompt and --keep-deltas"),
    "moments of another layer": ([], {"moments": "LAYER"}, "layer"),
    "no such history": (["--history"], {}, "finetune cannot preserve the keys of earlier edits"),
    "no held-out text": (["--held-out", "nowhere.txt"], {}, "nowhere.txt"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused(case, user, tmp_path, run):
    flags, changes, reason = BAD[case]
    if "moments" in changes:
        cc.Moments.load(user / "moments.safetensors", [0]).save(tmp_path / "layer.safetensors")
        changes = {"moments": tmp_path / "layer.safetensors"}
    code, _, error = run(*sequential(user, tmp_path / "out", *flags, **changes))
    assert code == 2
    assert reason in error
    assert "Traceback" not in error
    assert not files(tmp_path / "out")


def test_options_of_sequences_go_with_sequential(user, tmp_path, run):
    code, _, error = run(*arguments(user, tmp_path / "out", "--batch", 3))
    assert (code, "--batch goes with --sequential" in error) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_batch_of_other_facts_is_refused(user, whole):
    editor = cc.Editor.from_pretrained(str(user / "model"), cc.Moments.load(user / "moments.safetensors"))
    requests = editor.requests(FULL[::-1], "error_injection", filtered=False)
    sequence = editor.sequence(requests, "memit-seq", [2], 2, batch=2)
    file = whole / "batches/memit-seq-2/part-00000.safetensors"
    with pytest.raises(ExperimentError, match=r"batch 0 of this sequence is of .*many tokens"):
        sequence.restore(file)
    assert sequence.done == 0
