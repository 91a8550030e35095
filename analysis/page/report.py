"""One page of a sweep's answers, self-contained: HTML with plotly inside, to be opened from a disk, without network.

Texts and small tables are packed as JSON, all numbers of single facts as float32."""

import base64
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs
from plotly.offline import get_plotlyjs

from causalcone.analysis.effects import mean_effects
from causalcone.analysis.papers.inputs import AnalysisInputs, AnalysisOptions
from causalcone.analysis.papers.records import APART, ON_RECORD
from causalcone.analysis.papers.tables import AVERAGES, ENDS, SCORE_TABLES, Table, answer, paper_tables
from causalcone.analysis.sequences import METRICS, SEQUENCE, overview, with_health
from causalcone.analysis.stats.regressions import GROUP
from causalcone.analysis.sweep_results import ZEROED, Study
from causalcone.analysis.tables.edits import TEXT_SCHEMA
from causalcone.analysis.tables.names import COLORS, SEVERED, in_order, method_name, position
from causalcone.analysis.tables.traces import TableError, read_traces

SCORES = ("rewrite", "paraphrase", "neighborhood", "essence", "overall")
MOST_CHARACTERS = 4_000_000
"""Of texts in the page: of the first facts, as many as fit."""
_PERMUTATION = ("chance", "p_permutation", "permutation_facts", "permutation_diff")


@dataclass(frozen=True)
class Packed:
    """about: texts and tables that go into the page as JSON; numbers: (n,) float32, whose places are in ``about``."""

    about: dict[str, Any]
    numbers: np.ndarray

    def json(self) -> str:
        """Safe inside of a script element."""
        text = json.dumps(self.about, ensure_ascii=False, allow_nan=False)
        return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")

    def base64(self) -> str:
        """The numbers' bytes, least significant first, deflated."""
        return base64.b64encode(zlib.compress(self.numbers.astype("<f4").tobytes(), 6)).decode()


def report_data(study: Study, options: AnalysisOptions, progress: Sequence[Sequence[Any]] = ()) -> Packed:
    """Contents of the page; progress: of each stage of an unfinished sweep its name, and in words how many of its units
    and of its items are done. Raises ``TableError`` where there is nothing to show."""
    tables, missing = paper_tables(study, options)
    notes = [note for table in tables for note in table.notes]
    store = _Store(study)
    about = {
        "title": study.title,
        "status": study.run["status"],
        "progress": progress,
        "samples": study.configuration.get("noise", {}).get("samples"),
        "draws": options.draws,
        "record": next((note.removeprefix(ON_RECORD) for note in notes if note.startswith(ON_RECORD)), ""),
        "colors": COLORS,
        "answer": answer(tables),
        "header": tables[0].notes[-1] if tables else "",
        "missing": [*missing, *dict.fromkeys(note for note in notes if note.endswith(APART))],
        "r2": _r2(tables),
        "scores": _mean_scores(study),
        "windows": _windows(study, options),
        "averages": _averages(tables, [f"{kind}:{size}" for kind, size in study.states()]),
        "facts": store.rows(),
        "grids": _grids(study, store),
        "severed": _severed(study, store),
        "zeroed": _zeroed(study, store),
        "edits": _edits(study, store),
        "groups": _groups(study),
        "sequences": _sequences(study),
        "texts": _texts(study, store),
    }
    if not about["facts"]:
        raise TableError(f"{study.folder} holds no facts to report on yet")
    return Packed(about, np.concatenate(store.arrays))


def report(data: Packed) -> str:
    """The page: the answer, scores by layer and method, effects by window size, an explorer of single facts, and a
    table of all. ``data`` is what ``report_data`` gives; its texts stay texts."""
    parts = {
        "STYLE": _read("style.css"),
        "PLOTLY": get_plotlyjs(),
        "DATA": data.json(),
        "NUMBERS": data.base64(),
        "SCRIPT": "\n".join(map(_read, ("base.js", "study.js", "explorer.js", "table.js"))),
    }
    return re.sub("__(STYLE|PLOTLY|DATA|NUMBERS|SCRIPT)__", lambda match: parts[match[1]], _read("page.html"))


def _read(name: str) -> str:
    return files("causalcone.analysis").joinpath("page", name).read_text(encoding="utf-8")


class _Store:
    """The facts that were traced or edited, numbered in the order of the sweep, and numbers of them one array after the
    other."""

    def __init__(self, study: Study) -> None:
        tables = [study.scan(name).select("fact_id") for name in ("traces", "edits", "sequence") if study.has(name)]
        known = pl.concat(tables).unique().collect()["fact_id"].to_list() if tables else []
        self.facts = study.scan("facts.parquet").filter(pl.col("fact_id").is_in(known)).collect()
        self.number = {fact_id: number for number, fact_id in enumerate(self.facts["fact_id"])}
        self.arrays, self.length = [np.zeros(0, dtype=np.float32)], 0

    def add(self, values: np.ndarray) -> int:
        """Append numbers; returns where they begin."""
        self.arrays.append(np.ascontiguousarray(values, dtype=np.float32).ravel())
        self.length += values.size
        return self.length - values.size

    def rows(self) -> list[dict[str, Any]]:
        names = {"id": "fact_id", "prompt": "prompt", "subject": "subject", "true": "target_true", "new": "target_new"}
        names |= {"likeliest": "likeliest"} if "likeliest" in self.facts.columns else {}
        return self.facts.select(**names).to_dicts()

    def numbers_of(self, ids: pl.Series) -> np.ndarray:
        return ids.replace_strict(self.number, return_dtype=pl.Int64).to_numpy()


def _r2(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """By score, problem and method: R^2 of the layer and of both, what tracing adds, and its tests."""
    frames, key = {table.name: table.frame for table in tables}, [*GROUP, "score"]
    rows: list[dict[str, Any]] = []
    for number, score in SCORE_TABLES.items():
        if (name := f"table{number}_{score}") not in frames:
            continue
        frame = frames[name].with_columns(score=pl.lit(score))
        if "uncertainty" in frames:
            tests = frames["uncertainty"].select(*key, *ENDS, *_PERMUTATION, tests="note")
            frame = frame.join(tests, on=key, how="left", maintain_order="left")
        rows += _named_rows(frame)
    return rows


def _mean_scores(study: Study) -> list[dict[str, Any]]:
    """Lines by layer: problem, method, score, layers, means, errors, edits and facts."""
    try:
        means = in_order(study.mean_scores).filter(pl.col("n") > 0, pl.col("score").is_in(list(SCORES)))
    except TableError:
        return []
    lines = means.sort("layer", maintain_order=True).group_by(*GROUP, "score", maintain_order=True)
    return _named_rows(in_order(lines.agg("layer", "mean", "standard_error", "n", "facts")))


def _windows(study: Study, options: AnalysisOptions) -> list[dict[str, Any]]:
    """The mean tracing effect by layer of every state."""
    lines = []
    for kind, size in study.states():
        effects = study.effects((kind, size), "max", options.denominator)
        means = mean_effects(effects, AnalysisInputs(study, options).compat)
        lines.append({"name": f"{kind}:{size}", **means.to_dict(as_series=False)})
    return lines


def _averages(tables: Sequence[Table], states: Sequence[str]) -> list[dict[str, Any]]:
    """Average indirect effects by state and role: lines by layer, with those on record where there are any."""
    frame = next((table.frame for table in tables if table.name == AVERAGES), None)
    if frame is None:
        return []
    ordered = frame.sort(position("state", states), maintain_order=True)
    return ordered.group_by("state", "role", maintain_order=True).agg(pl.all()).to_dicts()


def _grids(study: Study, store: _Store) -> dict[str, Any] | None:
    """p(target) after restoring each state: (states, layers, tokens) for each fact, NaN where it was not."""
    states = study.states()
    if not states:
        return None
    traces = (
        read_traces(study.traces, study.answer_score)
        .filter(pl.col("token").is_not_null())
        .sort("fact_id", maintain_order=True)
    )
    depth = int(traces["layer"].max()) + 1  # type: ignore[arg-type]
    order = {state: number for number, state in enumerate(states)}
    entries: list[dict[str, Any] | None] = [None] * len(store.number)
    for (fact_id,), rows in traces.group_by("fact_id", maintain_order=True):
        length = int(rows["prompt_tokens"][0])
        grid = np.full((len(states), depth, length), np.nan, dtype=np.float32)
        number = np.array([order[state] for state in rows.select("kind", "window").rows()])
        grid[number, rows["layer"].to_numpy(), rows["token"].to_numpy()] = rows["p_patched"].to_numpy()
        texts = dict(rows.select("token", "token_text").unique("token").rows())
        clean, corrupted, start, end = rows.select("p_clean", "p_corrupted", "subject_start", "subject_end").row(0)
        entries[store.number[str(fact_id)]] = {
            "at": store.add(grid), "tokens": [texts.get(token) or "" for token in range(length)],
            "clean": clean, "corrupted": corrupted, "span": [start, end],
        }  # fmt: skip
    return {"states": [list(state) for state in states], "layers": depth, "facts": entries}


def _severed(study: Study, store: _Store) -> dict[str, Any] | None:
    """p(target) after restoring hidden:1 at the last subject token with modules severed: (facts, parts, layers)."""
    parts = [name for name in map("sever_{}".format, SEVERED) if study.has(f"traces/{name}")]
    if not parts:
        return None
    severed = pl.concat([study.scan(f"traces/{name}") for name in parts], how="diagonal")
    rows = read_traces(severed, study.answer_score).filter(pl.col("token") == pl.col("subject_end") - 1)
    if rows.is_empty():
        return None
    return {"parts": parts, **_by_layer(rows, "method", parts, "p_patched", store)}


def _zeroed(study: Study, store: _Store) -> dict[str, Any] | None:
    """The effect of zeroing: (facts, states, layers)."""
    states = study.states(ZEROED)
    if not states:
        return None
    parts = [f"{kind}:{size}" for kind, size in states]
    rows = pl.concat(study.zeroing(state) for state in states)
    named = rows.with_columns(part=pl.format("{}:{}", "kind", "window"))
    return {"parts": parts, **_by_layer(named, "part", parts, "effect", store)}


def _by_layer(rows: pl.DataFrame, key: str, parts: Sequence[str], value: str, store: _Store) -> dict[str, Any]:
    layers = int(rows["layer"].max()) + 1  # type: ignore[arg-type]
    values = np.full((len(store.number), len(parts), layers), np.nan, dtype=np.float32)
    number = rows[key].replace_strict({part: n for n, part in enumerate(parts)}, return_dtype=pl.Int64)
    values[store.numbers_of(rows["fact_id"]), number.to_numpy(), rows["layer"].to_numpy()] = rows[value].to_numpy()
    return {"at": store.add(values), "layers": layers}


def _edits(study: Study, store: _Store) -> dict[str, Any] | None:
    """Scores of single edits: (facts, groups, layers, scores); by fact/group/layer, why some are suspect."""
    try:
        scores = study.scores
    except TableError:
        return None
    groups = in_order(scores.select(GROUP).unique(maintain_order=True))
    layers = scores["layer"].unique().sort().to_list()
    values = np.full((len(store.number), len(groups), len(layers), len(SCORES)), np.nan, dtype=np.float32)
    order = {row: number for number, row in enumerate(groups.rows())}
    group = np.array([order[row] for row in scores.select(GROUP).rows()], dtype=np.int64)
    layer = np.searchsorted(layers, scores["layer"].to_numpy())
    fact = store.numbers_of(scores["fact_id"])
    for number, name in enumerate(SCORES):
        values[fact, group, layer, number] = scores[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
    marked = study.suspect.join(groups.with_row_index("group"), on=GROUP)
    places = zip(store.numbers_of(marked["fact_id"]), marked["group"], marked["layer"], marked["suspect"], strict=True)
    suspect = {f"{fact}/{group}/{layer}": reason for fact, group, layer, reason in places}
    about = {"groups": _named_rows(groups), "layers": layers, "scores": list(SCORES), "suspect": suspect}
    return {"at": store.add(values), **about}


def _groups(study: Study) -> list[dict[str, Any]]:
    """Answers to facts' own probes, and free answers, by group of prompts."""
    try:
        return _named_rows(in_order(study.answers).select(*GROUP, "layer", "group", "metric", "pre", "post"))
    except TableError:
        return []


def _sequences(study: Study) -> dict[str, list[dict[str, Any]]]:
    """Lines by the number of edits made, and a row for each checkpoint."""
    if study.sequences is None:
        return {"lines": [], "rows": []}
    lines = with_health(study.sequences).group_by(*SEQUENCE, "group", "metric", maintain_order=True)
    rows = overview(study.sequences)
    lacking = [pl.lit(None).alias(name) for name in METRICS if name not in rows.columns]
    return {
        "lines": _named_rows(lines.agg("edits", "post", "se", "n")),
        "rows": _named_rows(rows.with_columns(lacking)),
    }


def _texts(study: Study, store: _Store) -> dict[str, list[dict[str, Any]]]:
    """By number of a fact, what models wrote about it, edited where a setting's mean rewrite score is the best."""
    if not study.has("texts"):
        return {}
    means = study.mean_scores.filter(pl.col("n") > 0, score="rewrite").sort("mean", "layer", descending=[True, False])
    best = means.unique(GROUP, keep="first", maintain_order=True).select(*GROUP, "layer")
    edits = study.scan("edits").select("edit_id", "fact_id", *GROUP, "layer").collect().join(best, on=[*GROUP, "layer"])
    rows = study.scan("texts").collect().join(edits, on="edit_id", maintain_order="left")
    size = pl.sum_horizontal(pl.col("prompt", "before", "after").str.len_chars().fill_null(0))
    shown = rows.filter(size.cum_sum() <= MOST_CHARACTERS).select("fact_id", *GROUP, "layer", *TEXT_SCHEMA)
    by_fact = in_order(shown).group_by("fact_id", maintain_order=True)
    return {str(store.number[str(fact_id)]): _named_rows(each) for (fact_id,), each in by_fact}


def _named_rows(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """The rows with the method's name as it is shown; JSON has no numbers that are not finite."""
    floats = cs.float()
    finite = frame.with_columns(pl.when(floats.is_finite()).then(floats))
    return [{**row, "name": method_name(row["method"], row["window"])} for row in finite.iter_rows(named=True)]
