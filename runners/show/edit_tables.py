"""Summaries of tables of edits for the terminal."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl
from rich.table import Table
from rich.text import Text

from causalcone.analysis.scores import (
    SCORES,
    counterfact_metrics,
    mean_scores,
    own_groups,
    probe_metrics,
    scores,
    zsre_metrics,
)
from causalcone.analysis.tables.edits import read_edits, read_texts
from causalcone.analysis.tables.names import counted, heading, in_order, long_name, method_name, words
from causalcone.analysis.tables.traces import TableError
from causalcone.runners.show.tables import new_table

MOST_REASONS = 3
MOST_TEXTS, MOST_CHARACTERS = 8, 80

_SHOWN = [name for name in SCORES if name != "rewrite_magnitude"]


def scores_of(folder: Path, aggregate: str, essence: bool, answer_score: str = "product") -> pl.DataFrame:
    """The scores of the edits in a folder of results."""
    metrics = folder / "metrics" if essence else None
    return scores(folder / "edits", folder / "probes", metrics, aggregate, answer_score)  # type: ignore[arg-type]


def metrics_of(folder: Path, accuracy: bool, generation: bool) -> list[Table]:
    """Tables of accuracies, and of metrics of the texts that edited models write, if wanted."""
    tables = []
    for wanted, names, means in (
        (accuracy, ("efficacy", "paraphrase", "specificity"), zsre_metrics),
        (generation, ("GE", "RS"), counterfact_metrics),
    ):
        if wanted:
            try:
                tables += metric_tables(means(folder / "edits", folder / "metrics"), names)
            except TableError as error:
                warnings.warn(f"there is no table of {' and '.join(names)}: {error}", stacklevel=2)
    return tables


def answer_tables(folder: Path) -> list[Table]:
    """Means of ``probe_metrics`` by layer, of facts' own probes and of free answers: a table for each setting and
    metric, with a column for each group."""
    try:
        rows = own_groups(probe_metrics(*(folder / name for name in ("edits", "probes", "metrics"))))
    except TableError:  # no edit was done
        return []
    names = {
        "p": "p of accepted answers",
        "accuracy": "accuracy (teacher forcing)",
        "exact_match": "exact match (free)",
    }
    tables = []
    for metric, title in names.items():
        of_group = rows.filter(metric=metric).with_columns(metric="group")
        tables += metric_tables(of_group, of_group["metric"].unique(maintain_order=True).to_list(), title)
    return tables


def text_table(folder: Path) -> list[Table]:
    """The first text of each setting and kind of prompt, before and after an edit, a few of them."""
    if not (folder / "texts").is_dir():
        return []
    edits = read_edits(folder / "edits").select("edit_id", "method", "window", "layer")
    rows = read_texts(folder / "texts").join(edits, on="edit_id", maintain_order="left").drop_nulls("after")
    few = rows.unique(["method", "window", "prompt_kind"], keep="first", maintain_order=True).head(MOST_TEXTS)
    table = Table(*("edit", "prompt", "before", "after"), title="What models wrote, some of it", title_justify="left")
    for row in few.iter_rows(named=True):
        edit = f"{method_name(row['method'], row['window'])}, layer {row['layer']}, {row['prompt_kind']}"
        table.add_row(*(Text(_shown(text)) for text in (edit, row["prompt"], row["before"], row["after"])))
    return [table] if table.row_count else []


def _shown(text: str) -> str:
    """A text in one line, its beginning where it is long, without what a terminal would obey."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return line if len(line) <= MOST_CHARACTERS else line[: MOST_CHARACTERS - 1] + "\u2026"


def score_tables(table: pl.DataFrame) -> list[Table]:
    """Mean ``analysis.scores`` by layer, a table for each method and window; the best layer by each score in bold."""
    means = mean_scores(table).filter(pl.col("n") > 0)
    tables = []
    for method, window in _settings(table):
        means_of = means.filter(method=method, window=window)
        facts = table.filter(method=method, window=window)["fact_id"].n_unique()
        names = [name for name in _SHOWN if not means_of.filter(score=name).is_empty()]
        rows = {name: _by_layer(means_of.filter(score=name), "mean") for name in names}
        title = f"{_heading(method, window)}: mean scores of {counted(facts, 'fact')} by layer"
        shown = new_table(title, "layer", *map(words, names))
        for layer in means_of["layer"].unique().sort():
            shown.add_row(str(layer), *(_cell(rows[name], layer) for name in names))
        if names:
            tables.append(shown)
    return tables


def rewrite_tables(table: pl.DataFrame) -> list[Table]:
    """Mean rewrite scores by layer, a table for each problem; the best layer of each method and window in bold."""
    means = mean_scores(table).filter(pl.col("n") > 0, score="rewrite")
    tables = []
    for problem in in_order(means)["problem"].unique(maintain_order=True):
        posed = in_order(means.filter(problem=problem))
        facts = table.filter(problem=problem)["fact_id"].n_unique()
        layers = posed["layer"].unique().sort().to_list()
        title = f"{heading(problem)}: mean rewrite score of {counted(facts, 'fact')} by layer"
        shown = new_table(title, "method", *map(str, layers))
        for method, window in _settings(posed):
            row = _by_layer(posed.filter(method=method, window=window), "mean")
            shown.add_row(method_name(method, window), *(_cell(row, layer) for layer in layers))
        tables.append(shown)
    return tables


def metric_tables(metrics: pl.DataFrame, names: Sequence[str], title: str = "metrics") -> list[Table]:
    """Means of ``counterfact_metrics`` or ``zsre_metrics`` by layer, and before the edits; a table for each setting."""
    tables = []
    for method, window in _settings(metrics):
        rows = metrics.filter(pl.col("metric").is_in(names), method=method, window=window)
        present = [name for name in names if not rows.filter(metric=name).is_empty()]
        table = new_table(f"{_heading(method, window)}: {title} by layer", "layer", *map(words, present))
        before = dict(rows.group_by("metric").agg(pl.mean("pre")).select("metric", "pre").rows())
        table.add_row("unedited", *(f"{before[name]:.3f}" for name in present))
        for layer in rows["layer"].unique().sort():
            values = [_by_layer(rows.filter(metric=name), "post") for name in present]
            table.add_row(str(layer), *(f"{column[layer]:.3f}" if layer in column else "-" for column in values))
        if present:
            tables.append(table)
    return tables


def failed_lines(failed: Mapping[str, int], verb: str = "failed") -> list[str]:
    """How many edits failed, or "are suspect", and why."""
    often = sorted(failed.items(), key=lambda item: (-item[1], item[0]))
    verbs = {1: verb.replace("are", "is")}
    lines = [f"{counted(count, 'edit')} {verbs.get(count, verb)}: {reason}" for reason, count in often[:MOST_REASONS]]
    if rest := often[MOST_REASONS:]:
        few = sum(count for _, count in rest)
        lines.append(f"{counted(few, 'edit')} {verb} for {counted(len(rest), 'other reason')}")
    return lines


def best_sentences(table: pl.DataFrame) -> list[str]:
    """The layer with the best overall score, of several, for each problem, method and window."""
    means = mean_scores(table).filter(pl.col("n") > 0, score="overall").sort("mean", "layer", descending=[True, False])
    sentences: list[str] = []
    for problem in in_order(table)["problem"].unique(maintain_order=True):
        parts = []
        for method, window in _settings(in_order(table.filter(problem=problem))):
            best = means.filter(problem=problem, method=method, window=window).head(1)
            for layer, mean in _by_layer(best, "mean").items():
                parts.append(f"{method_name(method, window)} at layer {layer} ({mean:.3f})")
        if parts:
            choice = "best " * (means.filter(problem=problem)["layer"].n_unique() > 1)
            are = "scores are those" if len(parts) > 1 else "score is that"
            sentences.append(f"{heading(problem)}: the {choice}overall {are} of {', '.join(parts)}.")
    return sentences


def _settings(frame: pl.DataFrame) -> list[tuple[str, int]]:
    """Methods and windows in the table's order."""
    return frame.select("method", "window").unique(maintain_order=True).rows()


def _heading(method: str, window: int) -> str:
    name = long_name(method, window)
    return name[0].upper() + name[1:]


def _by_layer(rows: pl.DataFrame, column: str) -> dict[int, float]:
    return dict(rows.select("layer", column).drop_nulls().rows())


def _cell(values: Mapping[int, float], layer: int) -> str:
    if layer not in values:
        return "-"
    shown = f"{values[layer]:.3f}"
    return f"[bold]{shown}[/bold]" if len(values) > 1 and values[layer] == max(values.values()) else shown
