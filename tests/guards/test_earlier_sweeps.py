"""A sweep of before goes on, and is computed, analysed and kept in tables as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import pytest
from helpers.guards import (
    ARTIFACTS,
    DATA_SETS,
    arrow_schemas,
    assert_same_tables,
    carried_out,
    differences,
    digest,
    digests,
    kept_run,
    run,
    snapshot,
)

import causalcone as cc
from causalcone import analysis

READERS = {name: getattr(analysis, f"read_{name}") for name in DATA_SETS}
SWEEP = ("sweep", "sweep.toml", "--out")


@contextmanager
def interrupted(evaluations: int) -> Iterator[list[str]]:
    """Ends the process, as Ctrl-C does, when edits are about to be scored once more than so often."""
    evaluate, calls = cc.Editor.evaluate, []

    def counted(self: cc.Editor, edits: Any, **options: Any) -> Any:
        if len(calls) == evaluations:
            raise KeyboardInterrupt
        calls.append("evaluate")
        return evaluate(self, edits, **options)

    with patch.object(cc.Editor, "evaluate", counted):
        yield calls


def analyses(study: Path) -> dict[str, pl.DataFrame]:
    """What the functions of analysis make of a sweep's folder."""
    from causalcone.analysis.correlations import layer_correlations
    from causalcone.analysis.joined import edits_with_effects
    from causalcone.analysis.regressions import regressions
    from causalcone.analysis.study import Study
    from causalcone.analysis.uncertainty import left_out_layers, permutation_test

    traces = analysis.read_traces(study / "traces")
    restored = traces.filter(method="restore")
    scores = analysis.scores(study / "edits", study / "probes", study / "metrics")
    averages = analysis.average_indirect_effect(restored)
    own = Study(study)
    effects = own.effects(("mlp", 3))
    joined = edits_with_effects(own.scores, effects)
    found = {
        "read_traces": traces,
        "read_gradients": analysis.read_gradients(study / "gradients"),
        "read_edits": analysis.read_edits(study / "edits"),
        "read_probes": analysis.read_probes(study / "probes"),
        "read_metrics": analysis.read_metrics(study / "metrics"),
        "with_roles": analysis.with_roles(restored),
        "restore_effects": analysis.restore_effects(restored),
        "tracing_effects": analysis.tracing_effects(restored),
        "zeroing_effects": analysis.zeroing_effects(traces.filter(method="zero")),
        "flagged_facts": analysis.flagged_facts(restored),
        "average_indirect_effect": averages,
        "peak_layers": analysis.peak_layers(averages),
        "severed_effects": analysis.severed_effects(traces),
        "zeroing_curve": analysis.zeroing_curve(traces.filter(method="zero")),
        "concentrated_facts": analysis.concentrated_facts(effects),
        "gradient_norms": analysis.gradient_norms(study / "gradients"),
        "gradient_summary": analysis.gradient_summary(study / "gradients"),
        "scores": scores,
        "mean_scores": analysis.mean_scores(scores),
        "counterfact_metrics": analysis.counterfact_metrics(study / "edits", study / "metrics"),
        "zsre_metrics": analysis.zsre_metrics(study / "edits", study / "metrics"),
        "Study.scores": own.scores,
        "Study.mean_scores": own.mean_scores,
        "Study.traces": own.traces,
        "Study.effects": effects,
        "Study.zeroing": own.zeroing(("mlp", 3)),
        "edits_with_effects": joined,
        "regressions": regressions(joined, ["rewrite", "overall"]),
        "layer_correlations": layer_correlations(joined),
        "permutation_test": permutation_test(joined, draws=100),
        "left_out_layers": left_out_layers(joined),
    }
    return found


def made_files(folder: Path) -> dict[str, Any]:
    """What ``causalcone analyze`` writes: names of files, and of tables their first lines."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    heads = {name: (folder / name).read_text().splitlines()[0] for name in names if name.endswith(".csv")}
    return {"files": names, "heads": heads}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep, carried out from its beginning by today's code."""
    folder = tmp_path_factory.mktemp("study") / "user"
    shutil.copytree(ARTIFACTS, folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        carried_out(*SWEEP, "study", "--quiet")
    return folder / "study"


# --- tables and record ---


def test_a_half_done_sweep_goes_on(user, study, expected):
    """What is done stays untouched, the rest is computed, and the whole is that of a sweep in one go."""
    half = user / "half_sweep"
    done = {file: file.read_bytes() for file in sorted(half.rglob("part-*.parquet"))}
    assert len(done) == expected["sweep"]["parts done"]
    code, printed, error = run("status", "half_sweep")
    assert (code, "stopped" in printed) == (0, True), printed + error
    with interrupted(10**9) as calls:
        carried_out(*SWEEP, "half_sweep", "--quiet")
    assert len(calls) == expected["sweep"]["evaluations"] - expected["sweep"]["evaluations done"]
    assert {file: file.read_bytes() for file in done} == done
    assert len(sorted(half.rglob("part-*.parquet"))) == expected["sweep"]["parts"]
    assert json.loads((half / "run.json").read_text())["status"] == "complete"
    assert_same_tables(half, study)
    for name, read in READERS.items():
        now, then = read(half / name), read(study / name)
        assert now.schema == then.schema, name
        for column in now.columns:  # null where a part of before cannot know it
            known = now[column].is_not_null()
            told = differences(now[column].filter(known).to_list(), then[column].filter(known).to_list())
            assert not told, (name, column, told[:5])
    with interrupted(0):
        carried_out(*SWEEP, "half_sweep", "--quiet")


def test_a_sweep_computes_what_it_computed(study, expected):
    """Tables, record and facts are those of before."""
    assert not differences(digests(study), expected["sweep"]["tables"])
    assert not differences(kept_run(study), expected["sweep"]["run"])
    assert not differences(digest(pl.read_parquet(study / "facts.parquet")), expected["sweep"]["facts"])
    assert sorted(path.relative_to(study).as_posix() for path in study.rglob("*.parquet")) == expected["sweep"]["files"]


def test_tables_have_the_columns_that_they_had(study, user):
    """Names and types of the columns of every table on disk, that of facts that were left out and that of what failed
    included."""
    found = {"sweep": arrow_schemas(study), **rare_schemas()}
    assert not differences(found, snapshot("tables.json"))


def rare_schemas() -> dict[str, Any]:
    """Tables that are written only where something cannot be computed, in the current folder: a sweep of edits that
    are not posed, and one whose moments have been damaged."""
    drop = [part for key in ("trace", "sever", "zero", "gradients") for part in ("--set", f"{key}=none")]
    reversal = ('edit.problems=["tracing_reversal"]', 'edit.methods=["finetune:1"]', "noise.sigma=1e-12")
    asked = [part for change in reversal for part in ("--set", change)]
    carried_out("sweep", "sweep.toml", *drop, *asked, "--out", "reversal", "--quiet")
    moments = Path("half_sweep/moments.safetensors")
    moments.write_bytes(moments.read_bytes()[:-8])
    code, _, _ = run(*SWEEP, "half_sweep", "--quiet")
    assert code == 1
    left_out, failures = arrow_schemas(Path("reversal")), arrow_schemas(Path("half_sweep"))
    return {"left_out": left_out["left_out"], "failures": failures["failures"]}


# --- analysis ---


def test_analysis_says_what_it_said(study):
    """Schemas, rows and numbers of every function of analysis."""
    found = analyses(study)
    kept = snapshot("analysis.json")
    schemas = {name: [[key, str(kind)] for key, kind in frame.schema.items()] for name, frame in found.items()}
    assert not differences(schemas, kept["schemas"])
    assert not differences({name: digest(frame) for name, frame in found.items()}, kept["digests"], 1e-5)
    assert not differences(polars_schemas(), kept["read"])


def polars_schemas() -> dict[str, Any]:
    """Those that analysis names."""
    named = {name: getattr(analysis, name) for name in analysis.__all__ if name.endswith("_SCHEMA")}
    return {name: [[key, str(kind)] for key, kind in schema.items()] for name, schema in named.items()}


def test_analyze_writes_the_same_files(study, tmp_path):
    """``causalcone analyze``: names of files, and of tables their columns."""
    carried_out("analyze", study, "--no-figures", "--draws", "100", "--out", tmp_path / "out")
    assert not differences(made_files(tmp_path / "out"), snapshot("analysis.json")["analyze"])
