"""``causalcone analyze`` and ``report`` of studies that lack some of what was asked for."""

import polars as pl
import pytest
from helpers.made_up_study import EFFECTS, SCORES, TOKENS, edited, traced, write_study, zeroed

from causalcone.analysis import plot
from causalcone.analysis.page.report import report_data
from causalcone.analysis.papers.figures import paper_figures
from causalcone.analysis.papers.inputs import AnalysisOptions
from causalcone.analysis.papers.tables import paper_tables
from causalcone.analysis.sweep_results import Study

pytestmark = pytest.mark.slow

QUICK = AnalysisOptions(draws=100)
DRAWS = ("--draws", "100")


def test_a_folder_with_brackets_in_its_name(tmp_path, run):
    folder = write_study(
        tmp_path / "run[1]", traced(EFFECTS), [edited(SCORES)], tables={"traces/zero": zeroed(EFFECTS)}
    )
    code, printed, error = run("analyze", folder, *DRAWS)
    assert (code, error) == (0, "")
    n = "(6 edits of 3 facts at 2 layers)"
    assert f"explains 65% of the variance of rewrite scores by ROME in error injection {n}" in " ".join(printed.split())
    assert (folder / "analysis" / "tables" / "zeroing.csv").exists()
    assert (folder / "analysis" / "figures" / "average_indirect_effect.png").exists()
    assert run("report", folder, *DRAWS)[0] == 0


def test_probes_without_edits(tmp_path, run):
    _, probes = edited(SCORES)
    tables = {"probes/error_injection/rome-1": probes}
    folder = write_study(tmp_path, traced(EFFECTS), tables=tables, status="running")
    code, printed, error = run("analyze", folder, *DRAWS)
    assert (code, error) == (0, "")
    assert "missing: no figure scores_error_injection: " in printed
    assert "holds no edits yet" in printed
    assert (folder / "analysis" / "figures" / "effects_by_window.png").exists()


def test_tables_of_edits_without_rows(tmp_path):
    edits, probes = edited(SCORES)
    tables = {"edits/error_injection/rome-1": edits.clear(), "probes/error_injection/rome-1": probes.clear()}
    about = report_data(Study(write_study(tmp_path, traced(EFFECTS), tables=tables)), QUICK).about
    assert len(about["facts"]) == 3
    assert (about["r2"], about["scores"], about["edits"]["groups"]) == ([], [], [])


def test_facts_without_a_known_effect(tmp_path, run):
    """Of fact d clean and corrupted runs are as probable, so that there is no share of what was restored."""
    same = traced({"d": (0.4, 0.6)}).with_columns(p_clean=pl.lit(0.2), p_corrupted=pl.lit(0.2))
    folder = write_study(tmp_path, pl.concat([traced(EFFECTS), same]), [edited(SCORES)])
    code, printed, error = run("analyze", folder, "--denominator", "p_clean", *DRAWS)
    assert (code, error) == (0, "")
    assert "no figure" not in printed.replace("no figure scatter_zeroing", "")
    report_data(Study(folder), AnalysisOptions(denominator="p_clean", draws=100))


def test_zeroing_without_traces(tmp_path):
    folder = write_study(tmp_path, None, [edited(SCORES)], tables={"traces/zero": zeroed(EFFECTS)}, trace=None)
    (table,), missing = paper_tables(Study(folder), QUICK)
    assert (table.name, table.frame["r2_layer"][0]) == ("zeroing", pytest.approx(0.375 / 0.575))
    names = "table2, table3, table4, table5, table6, table7, uncertainty, correlations, unscaled, left_out_layers, "
    names += "average_effects"
    assert missing == [
        "the sweep has no traces",
        "the sweep has no integrated gradients",
        f"no {names}: there are no traces",
    ]
    drawn, _ = paper_figures(Study(folder), tmp_path / "figures", QUICK)
    assert "scatter_zeroing_rewrite.png" in {path.name for path in drawn}


# --- what is missing is named ---


def missing(folder):
    return set(Study(folder).missing()) - {"the sweep has no integrated gradients", "there are no zeroed states yet"}


def test_nothing_is_missing_of_what_is_whole(tmp_path):
    assert missing(write_study(tmp_path, traced(EFFECTS), [edited(SCORES)])) == set()


@pytest.mark.parametrize(
    ("configuration", "line"),
    [
        ({"sever": {"parts": ["mlp"]}}, "there are no traces with MLP outputs severed yet"),
        ({"sever": {"parts": ["both"]}}, "there are no traces with both outputs severed yet"),
        (
            {"edit": {"problems": ["error_injection"], "methods": ["rome", "memit:5"]}},
            "there are no edits of error injection by memit:5 yet",
        ),
        (
            {"edit": {"problems": ["error_injection"], "methods": ["rome", "finetune"]}},
            "there are no edits of error injection by finetune yet",
        ),
        (
            {"edit": {"problems": ["error_injection", "fact_forcing"], "methods": ["rome"]}},
            "there are no edits of fact forcing yet",
        ),
    ],
)
def test_what_was_asked_for_and_is_not_there(tmp_path, configuration, line):
    joint = edited(SCORES, method="memit_joint", window=5), edited(SCORES, method="memit", window=50)
    folder = write_study(tmp_path, traced(EFFECTS), [edited(SCORES), *joint], **configuration)
    assert missing(folder) == {line}


def test_edited_facts_that_are_not_traced(tmp_path):
    folder = write_study(tmp_path, traced({"a": EFFECTS["a"]}), [edited(SCORES)])
    assert missing(folder) == {
        "edited facts that are not traced: 2 of 3 (4 of 6 edits without a tracing effect, in no regression)"
    }


def test_facts_that_were_left_out(tmp_path):
    rows = [("x", "trace/restore/00000", "x is too long"), ("y", "trace/restore/00001", "y is too long")]
    rows += [("x", "edit/error_injection/rome-1/00000", "x is too long")]
    left = pl.DataFrame(rows, schema=["fact_id", "unit", "reason"], orient="row")
    folder = write_study(tmp_path, traced(EFFECTS), [edited(SCORES)], tables={"left_out": left})
    assert missing(folder) == {
        "2 facts left out of trace, the first: x is too long",
        "1 fact left out of edit, the first: x is too long",
    }


# --- figures ---


def test_gradients_are_labelled_by_the_tokens_of_the_prompt(tmp_path, monkeypatch):
    """Only the last token was traced: the texts of the others are not known, and its own stays at its place."""
    rows = [(fact, "mlp", layer, token, 0.5, 0.1, 0.0) for fact in "ab" for layer in (0, 1) for token in range(3)]
    columns = ["fact_id", "kind", "layer", "token", "norm", "total", "gap"]
    gradients = pl.DataFrame(rows, schema=columns, orient="row")
    folder = write_study(tmp_path, traced(EFFECTS, token=2), tables={"gradients": gradients}, edit=None)
    seen, draw = [], plot.gradients

    def watched(table, fact_id, texts, subject):
        seen.append((fact_id, texts, subject))
        return draw(table, fact_id, texts, subject)

    monkeypatch.setattr(plot, "gradients", watched)
    _, undrawn = paper_figures(Study(folder), tmp_path / "figures", QUICK)
    assert seen == [(fact, ["", "", TOKENS[2]], (0, 1)) for fact in "ab"]
    assert not [line for line in undrawn if "gradients" in line]


@pytest.mark.parametrize(("option", "positive"), [((), False), (("--compat", "published"), True)])
def test_published_means_by_layer_are_an_option(tmp_path, monkeypatch, run, option, positive):
    from causalcone.analysis.papers import figures as module

    seen, draw = [], module.effects_by_window
    monkeypatch.setattr(
        module, "effects_by_window", lambda *given, **named: seen.append(named) or draw(*given, **named)
    )
    folder = write_study(tmp_path, traced(EFFECTS), [edited(SCORES)])
    assert run("analyze", folder, *option, *DRAWS)[0] == 0
    assert seen == [{"compat": "published" if positive else None}]
    code, _, error = run("analyze", folder, "--compat", "papers")
    assert (code, "--compat is 'papers'; choose from published" in error) == (2, True)
