"""Edits in sequence as a stage of a sweep: forecast, killed and gone on with, and in the analysis."""

import multiprocessing
import signal
import time

import polars as pl
import pytest
from helpers.compare import assert_table_close
from helpers.editing_cases import FULL
from helpers.sweeps import configured, swept

from causalcone.analysis.page.report import report_data
from causalcone.analysis.papers.inputs import AnalysisOptions
from causalcone.analysis.sweep_results import Study
from causalcone.engine.errors import ExperimentError
from causalcone.engine.schemas import CHECKPOINT_SCHEMA, SEQUENCE_SCHEMA
from causalcone.runners.results.folder import ResultError
from causalcone.runners.sweep.forecast import forecast

CHANGES = (
    *(f"{table}=none" for table in ("trace", "sever", "zero", "gradients", "edit")),
    'sequence={ methods = ["memit-seq:2", "finetune:1"], layers = [2], set = ["steps=2"] }',
    *("sequence.batch=1", "sequence.checkpoint=3", "sequence.sample=2"),
    'sequence.problems=["error_injection", "fact_amplification"]',
)
GROUPS = [f"{p}/{m}" for p in ("error_injection", "fact_amplification") for m in ("finetune-1", "memit-seq-2")]


@pytest.fixture(scope="module")
def study(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    assert swept(file, out, *CHANGES).status == "complete"
    return out


def rows(out, name):
    return pl.concat(map(pl.read_parquet, sorted((out / name).rglob("*.parquet")))).drop("seconds", strict=False)


def test_a_table_for_each_problem_and_method(study):
    for name, schema in (("sequence", SEQUENCE_SCHEMA), ("checkpoints", CHECKPOINT_SCHEMA)):
        files = sorted(str(path.relative_to(study / name)) for path in (study / name).rglob("*.parquet"))
        assert files == [f"{group}/part-00000.parquet" for group in GROUPS]
        assert pl.read_parquet(study / name / files[0]).columns == schema.names
    assert rows(study, "sequence").height == 4 * len(FULL)
    scored = rows(study, "checkpoints").select("problem", "method", "edits", "group", "fact_id").unique()
    for group, counts in (("newest", {3: 1, 6: 1}), ("earlier", {3: 2, 6: 2})):
        of_group = scored.filter(group=group).group_by("problem", "method", "edits").len()
        assert of_group.height == 4 * 2
        assert {edits: count for *_, edits, count in of_group.rows()} == counts


def killed(file, out, files):
    """A sweep that was killed once so many batches were there."""
    process = multiprocessing.get_context("fork").Process(target=swept, args=(file, out, *CHANGES))
    process.start()
    while process.is_alive() and len(list((out / "state").rglob("*.safetensors"))) < files:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_sequence_goes_on_at_its_last_batch(file, study, tmp_path):
    out = tmp_path / "out"
    killed(file, out, 4)
    assert not (out / "checkpoints").exists()  # the unit is not done
    under_way = Study(out)
    assert under_way.sequences["edits"].unique().to_list() == [3]  # what it has measured is seen all the same
    kept = {path: path.stat().st_mtime_ns for path in (out / "state").rglob("*.safetensors")}
    assert swept(file, out, *CHANGES).status == "complete"
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    for name in ("sequence", "checkpoints"):
        assert_table_close(rows(out, name), rows(study, name), 1e-6)


def test_the_forecast_counts_rows(file, study):
    planned = {cost.work.subject: cost for cost in forecast(configured(file, *CHANGES), rate=1e12).stages if cost.rows}
    for problem in ("error_injection", "fact_amplification"):
        cost = planned[problem]
        assert cost.work.items == 2 * len(FULL)
        assert cost.rows["sequence"] == rows(study, "sequence").filter(problem=problem).height
        found = rows(study, "checkpoints").filter(problem=problem).height
        assert 0.6 * found <= cost.rows["checkpoints"] <= 1.4 * found
        kept = sum(path.stat().st_size for path in (study / "state").glob(f"*/{problem}/*/*"))
        assert 0.6 * kept <= cost.other_bytes <= 1.4 * kept


def test_more_is_scored_at_more_checkpoints(file):
    few, many = (
        forecast(configured(file, *CHANGES, f"sequence.checkpoint={every}"), rate=1e12).stages[-1].flops
        for every in (6, 1)
    )
    assert few < many


def test_a_sequence_edits_one_window(file, tmp_path):
    with pytest.raises(ExperimentError, match=r"sequence.layers are .*; give the layer in its centre"):
        swept(file, tmp_path / "out", *CHANGES, "sequence.layers=[1, 2]")


def test_another_batch_is_another_sweep(file, study):
    with pytest.raises(ResultError, match=r"sequence.batch: 1 before, 2 now"):
        swept(file, study, *CHANGES, "sequence.batch=2")


def test_analysis_and_report_have_it(study, tmp_path, run):
    code, _, error = run("analyze", study, "--out", tmp_path)
    assert (code, error) == (0, "")
    assert (tmp_path / "figures/sequences.png").stat().st_size > 10_000
    table = pl.read_csv(tmp_path / "tables/sequences.csv")
    assert table.height == 2 * 2 * 2 * 2  # problems, methods, checkpoints, groups of edits
    about = report_data(Study(study), AnalysisOptions(draws=100)).about
    assert len(about["facts"]) == len(FULL)
    assert len(about["sequences"]["rows"]) == table.height
    (line,) = (
        line
        for line in about["sequences"]["lines"]
        if (line["problem"], line["method"], line["group"], line["metric"])
        == ("error_injection", "memit-seq", "newest", "rewrite_p")
    )
    shown = table.filter(problem="error_injection", method="memit-seq", group="newest")
    assert line["edits"] == shown["edits"].to_list() == [3, 6]
    assert line["post"] == pytest.approx(shown["rewrite_p"].to_list())
    assert line["name"] == "MEMIT-seq-2"
