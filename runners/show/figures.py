"""The figures that commands draw into a folder of results."""

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import polars as pl
import pyarrow as pa

from causalcone.analysis import TableError, plot, sequence_scores
from causalcone.analysis.tables.traces import AnswerScore
from causalcone.engine.encoding import token_texts
from causalcone.engine.facts import Fact
from causalcone.engine.localize.tracer import Tracer

PLOTS = "plots"
_SCORES = ("rewrite", "paraphrase", "neighborhood", "essence")


def draw_traces(
    folder: Path,
    first: Sequence[pa.RecordBatch],
    table: Path,
    joint: bool = False,
    answer_score: AnswerScore = "product",
) -> list[Path]:
    """Heat maps of each batch's fact, and the average indirect effect of all of the table's facts; of tokens restored
    together, which have no map, their effect by layer."""
    if joint:
        return draw_table(folder, "joint_effect", table, answer_score)
    paths = []
    for number, batch in enumerate(first):
        fact_id = batch["fact_id"][0].as_py()
        paths.append(_path(folder, f"{number:03}", fact_id))
        plot.heatmaps(pa.Table.from_batches([batch]), fact_id, paths[-1], answer_score)
    average = folder / PLOTS / "average_indirect_effect.png"
    return paths + _if_possible("averages", average, lambda: plot.indirect_effect(table, average, answer_score))


def draw_table(
    folder: Path,
    figure: Literal["joint_effect", "severed", "zeroing"],
    table: Path,
    answer_score: AnswerScore = "product",
) -> list[Path]:
    """A figure of ``plot`` that is made of a whole table."""
    path = folder / PLOTS / f"{figure}.png"
    getattr(plot, figure)(table, path=path, answer_score=answer_score)
    return [path]


def draw_scores(folder: Path, table: pl.DataFrame) -> list[Path]:
    """Mean scores of edits by layer and method, those that there are."""
    names = [name for name in _SCORES if table[name].is_not_null().any()]
    path = folder / PLOTS / "scores.png"
    return _if_possible("scores", path, lambda: plot.scores(table, names, path))


def draw_sequence(folder: Path) -> list[Path]:
    """Edits in sequence by the number of edits made."""
    path = folder / PLOTS / "sequence.png"
    plot.sequence(sequence_scores(folder / "checkpoints"), path)
    return [path]


def _if_possible(name: str, path: Path, draw: Callable[[], object]) -> list[Path]:
    """The path that ``draw`` writes to; a warning where the table has not what the figure shows."""
    try:
        draw()
    except TableError as error:
        warnings.warn(f"there is no figure of {name}: {error}", stacklevel=3)
        return []
    return [path]


def draw_gradients(folder: Path, first: Sequence[pa.RecordBatch], facts: Sequence[Fact], tracer: Tracer) -> list[Path]:
    """Heat maps of each batch's fact."""
    by_id = {fact.id: fact for fact in facts}
    paths = []
    for number, batch in enumerate(first):
        fact = by_id[batch["fact_id"][0].as_py()]
        prompt = tracer.session.prompts.fact(fact, "argmax")
        texts = token_texts(prompt.prompt, tracer.session.tokenizer)
        paths.append(_path(folder, f"gradients-{number:03}", fact.id))
        plot.gradients(batch, fact.id, texts, prompt.span, paths[-1])
    return paths


def _path(folder: Path, name: str, fact_id: str) -> Path:
    return folder / PLOTS / f"{name}-{re.sub(r'[^A-Za-z0-9_-]+', '_', fact_id)[:60]}.png"
