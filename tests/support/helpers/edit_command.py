"""What tests of ``causalcone edit`` share: what a user has, its arguments, and reading what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from causalcone.analysis import read_edits, read_metrics, read_probes
from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.localize.tracer import Tracer
from causalcone.runners.facts.files import save_facts
from helpers.command_line import running_text
from helpers.compare import assert_table_close
from helpers.editing_cases import FULL

CONTEXTS = {"rome": ["They say", "Bo"], "memit": ["In the city"]}
PRESET_SETTINGS = """\
edit_layers = [1, 3]
sigma = 0.4
tracing_window = 3
aggregate = "mean"
"""
"""What every preset needs, in TOML."""

STARTING_PRESET = f"""
[own]
{PRESET_SETTINGS}defaults.rome.lr = 0.25
defaults.finetune.stop_loss = "never"
[own.problems.error_injection]
rome.kl_factor = 0.9
finetune.1.norm_constraint = 1e-3
finetune.1.steps = 7
[own.problems.fact_erasure]
memit.steps = 3
"""
"""What a tuning starts from."""

FAST = ("--set", "steps=2", "--quiet")


def write_inputs(folder: Path) -> Path:
    """Beside a model and its tokenizer: facts that have all their prompts, texts, moments of the model, contexts."""
    save_facts(FULL, folder / "full.jsonl")
    texts = running_text()
    (folder / "texts.txt").write_text("\n".join(texts))
    (folder / "contexts.json").write_text(json.dumps(CONTEXTS))
    session = Tracer.from_pretrained(str(folder / "model")).session
    Moments.collect(session.model, session.tokenizer, texts).save(folder / "moments.safetensors")
    return folder


def arguments(user: Path, out: Path, *flags: Any, **changes: Any) -> list[Any]:
    """A study of all facts; options are changed, or left out where they are None."""
    options: dict[str, Any] = {"model": user / "model", "facts": user / "full.jsonl", "out": out, "method": "rome"}
    options |= {"moments": user / "moments.safetensors", "contexts": user / "contexts.json", **changes}
    given = [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
    return ["edit", *given, "--no-filter", *flags]


def read(out: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """The tables of edits, probes and metrics."""
    return read_edits(out / "edits"), read_probes(out / "probes"), read_metrics(out / "metrics")


def run_json(out: Path) -> dict[str, Any]:
    """What is kept of the run."""
    return dict(json.loads((out / "run.json").read_text()))


def assert_same(found: tuple[pl.DataFrame, ...], expected: tuple[pl.DataFrame, ...]) -> None:
    """The tables are the same, row by row, but for the rounding of float32, which steps magnify."""
    for table, wanted in zip(found, expected, strict=True):
        assert_table_close(table, wanted, 1e-4)
