"""What tests of sweeps share: a sweep of every stage on a small model, and reading what it wrote."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from causalcone.runners.sweep.config import load_sweep
from causalcone.runners.sweep.driver import Driver, SweepSummary
from causalcone.runners.sweep.inputs.settings import Sweep
from causalcone.runners.sweep.inputs.units import Unit
from causalcone.runners.sweep.worker import Worker
from helpers.compare import assert_table_close
from helpers.edit_command import write_inputs

TABLES = ("traces", "gradients", "edits", "probes", "metrics", "texts")

CONFIGURATION = """
model = "{user}/model"
facts = "{user}/full.jsonl"
contexts = "{user}/contexts.json"
moments.file = "{user}/moments.safetensors"
filter.completes = false
filter.erasable = 0.0
noise = {{ sigma = 0.4, samples = 2 }}
units = {{ facts = 2, edits = 4 }}

[trace]
states = ["hidden:1", "mlp:3"]

[sever]
parts = ["mlp"]

[zero]
states = ["mlp:3"]

[gradients]
kinds = ["mlp"]
steps = 2
facts = 3

[edit]
problems = ["error_injection", "fact_forcing"]
methods = ["rome", "memit:2", "finetune:1"]
layers = [0, 2]
set = ["steps=2"]
accuracy = true
"""


def write_sweep(folder: Path) -> Path:
    """Beside a model: facts, moments, contexts and the file of a sweep."""
    write_inputs(folder)
    file = folder / "sweep.toml"
    file.write_text(CONFIGURATION.format(user=folder))
    return file


def swept(file: Path, out: Path | str, *changes: str, **options: Any) -> SweepSummary:
    """A sweep carried out in this process."""
    console = Console(file=io.StringIO(), width=200)
    return Driver(configured(file, *changes), str(out), console, **options).run()


def configured(file: Path, *changes: str) -> Sweep:
    return load_sweep(str(file), changes)


def stopped_after(monkeypatch: pytest.MonkeyPatch, count: int, error: Any) -> list[Unit]:
    """Makes workers fail in the unit after so many; returns the list of those that they carry out."""
    run, done = Worker.run, []

    def running(self: Worker, unit: Unit) -> Any:
        if len(done) == count:
            raise error
        done.append(unit)
        return run(self, unit)

    monkeypatch.setattr(Worker, "run", running)
    return done


def tables(out: Path) -> dict[str, pl.DataFrame]:
    """All data sets of a sweep, part by part in the order of their names."""
    found = {name: sorted((out / name).rglob("*.parquet")) for name in TABLES}
    return {name: pl.concat(map(pl.read_parquet, files)) for name, files in found.items() if files}


def assert_same_tables(found: dict[str, pl.DataFrame], expected: dict[str, pl.DataFrame], within: float = 1e-6) -> None:
    """Row for row; numbers within so much of their size, or of 1 where that is larger."""
    assert found.keys() == expected.keys()
    for name, table in found.items():
        assert_table_close(table, expected[name], within)
