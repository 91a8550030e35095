"""The folder of a sweep that no model was run for: tables of a few facts whose scores and effects are as given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from causalcone.analysis import EDIT_SCHEMA, PROBE_SCHEMA
from helpers.trace_tables import fact_traces

TOKENS = (" Rome", " is", " in")

# Effects and scores of three facts at two layers, from which tests work out regressions by hand.
EFFECTS = {"a": (0.0, 0.0), "b": (0.5, 0.5), "c": (1.0, 1.0)}
SCORES = {"a": (0.0, 0.9), "b": (0.1, 0.6), "c": (0.5, 0.6)}

Values = Mapping[str, Sequence[float]]


def traced(effects: Values, token: int = 0, *, method: str = "restore", p_corrupted: float = 0.0) -> pl.DataFrame:
    """Traces of mlp:5 whose effects, by fact and layer, are the given ones: p_clean is 1 and p_corrupted 0."""
    return pl.concat(
        fact_traces(
            {(layer, token): value for layer, value in enumerate(values)}, tokens=TOKENS, subject=(0, 1),
            p_clean=1.0, p_corrupted=p_corrupted, fact_id=fact, method=method, kind="mlp", window=5,
        )
        for fact, values in effects.items()
    )  # fmt: skip


def zeroed(effects: Values) -> pl.DataFrame:
    """Zeroed states of mlp:5 with these effects: p_clean is 1, and the rest is lost."""
    rows = traced({fact: [1 - value for value in values] for fact, values in effects.items()}, method="zero")
    return rows.with_columns(token=pl.lit(None, pl.Int64), token_text=pl.lit(None, pl.String))


def edited(
    scores: Values, problem: str = "error_injection", method: str = "rome", window: int = 1
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Edits and probes whose rewrite scores, by fact and layer, are the given ones. The other target ends at half of
    that; paraphrases are scored 0.4, neighbours 1."""
    edits, probes = [], []
    for fact, values in scores.items():
        for layer, value in enumerate(values):
            name = f"{fact}-{problem}-{method}-{window}-{layer}"
            row = {"edit_id": name, "fact_id": fact, "problem": problem, "method": method, "layer": layer}
            edits.append({**row, "window": window, "steps": 1, "status": "done"})
            probes += [
                (name, "rewrite", 0, 0.0, value, 0.0, value / 2),
                (name, "paraphrase", 0, 0.0, 0.4, None, None),
                (name, "neighborhood", 0, 0.5, 0.5, None, None),
            ]
    return pl.DataFrame(edits, schema=EDIT_SCHEMA), pl.DataFrame(
        probes, schema=dict([*PROBE_SCHEMA.items()][:7]), orient="row"
    )


def write_study(
    folder: Path,
    traces: pl.DataFrame | None = None,
    edits: Sequence[tuple[pl.DataFrame, pl.DataFrame]] = (),
    *,
    tables: Mapping[str, pl.DataFrame] | None = None,
    analysis: Mapping[str, Any] | None = None,
    status: str = "complete",
    **configuration: Any,
) -> Path:
    """Writes run.json, facts, traces, edits with their probes, and further tables by the name of their folder."""
    written = dict(tables or {})
    if traces is not None:
        written["traces/restore"] = traces
    for rows, probes in edits:
        problem, method, window = rows.select("problem", "method", "window").row(0)
        written[f"edits/{problem}/{method}-{window}"] = rows
        written[f"probes/{problem}/{method}-{window}"] = probes
    facts: set[str] = set()
    for name, table in written.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        table.write_parquet(folder / name / "part-00000.parquet")
        facts |= set(table["fact_id"]) if "fact_id" in table.columns else set()
    texts = {"prompt": "{} is in", "subject": "Rome", "target_true": "Italy", "target_new": "Spain"}
    pl.DataFrame({"fact_id": sorted(facts)}).with_columns(
        pl.lit(text).alias(name) for name, text in texts.items()
    ).write_parquet(folder / "facts.parquet")
    asked = {
        "trace": {"states": ["mlp:5"]},
        "zero": {"states": ["mlp:5"]},
        "edit": {"problems": ["error_injection"], "methods": ["rome"]},
    }
    run = {
        "command": "sweep",
        "status": status,
        "configuration": {**asked, **configuration},
        "analysis": analysis or {},
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder
