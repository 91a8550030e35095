"""The figures that commands draw into a folder of results."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa

from causalcone.analysis import TableError, plot
from causalcone.engine.facts import Fact, encode, token_texts
from causalcone.engine.localize.tracer import Tracer

PLOTS = "plots"
_SCORES = ("rewrite", "paraphrase", "neighborhood", "essence")


def draw_traces(
    folder: Path, first: Sequence[pa.RecordBatch], joint: bool = False, table: str = "traces"
) -> list[Path]:
    """Heat maps of each batch's fact, and the average indirect effect of all of the table's facts; of tokens restored
    together, which have no map, their effect by layer."""
    plots = folder / PLOTS
    if joint:
        plot.joint_effect(folder / table, plots / "joint_effect.png")
        return [plots / "joint_effect.png"]
    paths = []
    for number, batch in enumerate(first):
        fact_id = batch["fact_id"][0].as_py()
        paths.append(plots / f"{number:03}-{_file_name(fact_id)}.png")
        plot.heatmaps(pa.Table.from_batches([batch]), fact_id, paths[-1])
    average = plots / "average_indirect_effect.png"
    try:
        plot.indirect_effect(folder / table, average)
    except TableError as error:
        warnings.warn(f"there is no figure of averages: {error}", stacklevel=2)
        return paths
    return [*paths, average]


def draw_zeroing(folder: Path, table: str = "traces") -> list[Path]:
    """The mean effect of zeroing by layer."""
    path = folder / PLOTS / "zeroing.png"
    plot.zeroing(folder / table, path)
    return [path]


def draw_severed(folder: Path) -> list[Path]:
    """Severed against plain restoring, from a table that has both."""
    path = folder / PLOTS / "severed.png"
    plot.severed(folder / "traces", path=path)
    return [path]


def draw_scores(folder: Path, table: pl.DataFrame) -> list[Path]:
    """Mean scores of edits by layer and method, those that there are."""
    names = [name for name in _SCORES if table[name].is_not_null().any()]
    path = folder / PLOTS / "scores.png"
    try:
        plot.scores(table, names, path)
    except TableError as error:
        warnings.warn(f"there is no figure of scores: {error}", stacklevel=2)
        return []
    return [path]


def draw_gradients(folder: Path, first: Sequence[pa.RecordBatch], facts: Sequence[Fact], tracer: Tracer) -> list[Path]:
    """Heat maps of each batch's fact."""
    by_id = {fact.id: fact for fact in facts}
    tokenizer, sizes = tracer.session.tokenizer, tracer.session.sizes
    paths = []
    for number, batch in enumerate(first):
        fact = by_id[batch["fact_id"][0].as_py()]
        prompt = encode(fact, tokenizer, "argmax", sizes.vocabulary, sizes.positions)
        texts = token_texts(prompt.prompt, tokenizer)
        paths.append(folder / PLOTS / f"gradients-{number:03}-{_file_name(fact.id)}.png")
        plot.gradients(batch, fact.id, texts, prompt.span, paths[-1])
    return paths


def _file_name(fact_id: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", fact_id)[:60]
