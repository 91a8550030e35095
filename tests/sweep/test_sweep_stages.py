"""A stage of another package, registered by its entry point, is carried out, planned and shown like all others."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from typing import ClassVar

import polars as pl
import pyarrow as pa
import pytest
from helpers.editing_cases import FULL
from helpers.sweeps import configured, swept

from causalcone.analysis.sweep_results import Study
from causalcone.runners.checked_files import CheckedTable, Count
from causalcone.runners.sweep.forecast import forecast
from causalcone.runners.sweep.stages import GROUP
from causalcone.runners.sweep.stages.stage import ResultTable, Stage, StageCost
from causalcone.runners.sweep.status import status_of
from causalcone.runners.sweep.worker import Worker

SCHEMA = pa.schema([("fact_id", pa.string()), ("tokens", pa.int32()), ("sigma", pa.float64())])
FEW = ("trace=none", "sever=none", "zero=none", "gradients=none", "edit=none")
TOY = "toy={ times = 3, facts = 5 }"


class ToySettings(CheckedTable):
    times: Count = 1
    facts: Count | None = None


class Toy(Stage[ToySettings]):
    """Counts the tokens of prompts."""

    name, title, table = "toy", "counting tokens", ToySettings
    tables = (ResultTable("lengths", SCHEMA, row_bytes=10),)
    needs = ("noise",)
    expected: ClassVar = {"lengths": "lengths"}

    def compute(self, unit, resources):
        rows = [
            {
                "fact_id": fact.id,
                "tokens": self.options.times * len(resources.session.tokenizer(fact.text)["input_ids"]),
                "sigma": resources.noise_level,
            }
            for fact in resources.facts_of(unit)
        ]
        return {"lengths": pa.Table.from_pylist(rows, schema=SCHEMA)}

    def cost(self, units, counts):
        return StageCost(units, flops=1e6 * units.items, rows={"lengths": units.items})


@dataclass(frozen=True)
class Entry:
    def load(self):
        return Toy


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """As an installed package registers a stage."""
    entry_points = importlib.metadata.entry_points
    monkeypatch.setattr(
        "causalcone.runners.sweep.stages.entry_points",
        lambda *, group: [Entry()] if group == GROUP else entry_points(group=group),
    )


def lengths(out):
    return pl.concat(map(pl.read_parquet, sorted((out / "lengths").glob("part-*.parquet"))))


def test_it_is_carried_out_and_shown(file, tmp_path, run):
    out = tmp_path / "out"
    flags = [part for change in (*FEW, TOY) for part in ("--set", change)]
    code, printed, error = run("sweep", file, "--out", out, *flags)
    assert (code, error) == (0, "")
    assert "counting tokens: 5/5 facts" in printed
    table = lengths(out)
    assert table["fact_id"].to_list() == [fact.id for fact in FULL[:5]]
    assert (table["tokens"] % 3 == 0).all()
    assert table["sigma"].to_list() == [0.4] * 5
    (shown,) = [each for each in status_of(str(out)).stages if each.work.title == "counting tokens"]
    assert (shown.done, shown.failed, shown.work.items) == (5, 0, 5)
    code, printed, _ = run("status", out)
    assert (code, "counting tokens" in printed) == (0, True)


def test_it_is_planned(file, run):
    flags = [part for change in (*FEW, TOY) for part in ("--set", change)]
    code, printed, error = run("sweep", file, "--plan", "--rate", "1e12", *flags)
    assert (code, error) == (0, "")
    assert "counting tokens" in printed
    *_, toy = forecast(configured(file, *FEW, TOY), rate=1e12).stages
    assert (len(toy.work.units), toy.work.items, toy.flops) == (3, 5, 5e6)


def test_it_goes_on_after_an_interruption(file, tmp_path, monkeypatch):
    out, run = tmp_path / "out", Worker.run

    def interrupted(self, unit):
        if unit.name == "toy/00001":
            raise KeyboardInterrupt
        return run(self, unit)

    monkeypatch.setattr(Worker, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swept(file, out, *FEW, TOY)
    monkeypatch.setattr(Worker, "run", run)
    assert lengths(out).height == 2
    assert "there are no lengths yet" not in list(Study(out).missing())
    summary = swept(file, out, *FEW, TOY)
    assert (summary.status, summary.computed) == ("complete", 2)
    assert lengths(out).height == 5
    assert swept(file, out, *FEW, TOY).computed == 0


def test_it_is_missing(file, tmp_path, monkeypatch):
    def broken(self, unit, resources):
        raise RuntimeError("no tokens today")

    monkeypatch.setattr(Toy, "compute", broken)
    assert swept(file, tmp_path / "out", *FEW, TOY).status == "incomplete"
    assert "there are no lengths yet" in list(Study(tmp_path / "out").missing())


def test_its_keys_are_checked(file, tmp_path, run):
    code, _, error = run("sweep", file, "--out", tmp_path / "out", "--set", "toy={ times = 0 }")
    assert (code, "toy.times must be at least 1" in error) == (2, True)
    code, _, error = run("sweep", file, "--out", tmp_path / "out", "--set", "toy={ words = 1 }")
    assert (code, "toy cannot have 'words', only times, facts" in error) == (2, True)


def test_sweeps_without_it_stay_the_same(file, monkeypatch, tmp_path):
    """A package that is installed later does not change a sweep's hash."""
    with_package = configured(file)
    monkeypatch.setattr("causalcone.runners.sweep.stages.entry_points", lambda *, group: [])
    assert configured(file).hash == with_package.hash
    swept(file, tmp_path / "out", *FEW[:4], 'edit.methods=["finetune:1"]', 'edit.problems=["error_injection"]')
    assert "expected" not in json.loads((tmp_path / "out" / "run.json").read_text())["analysis"]
