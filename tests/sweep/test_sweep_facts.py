"""The facts of a sweep: of every format, told what it is, kept whole in the table; a problem that is possible."""

from __future__ import annotations

import io
import json
from pathlib import Path

from helpers.format_records import FORMATS, WIKIBIGEDIT
from rich.console import Console

import causalcone as cc
from causalcone.runners.sweep.config import load_sweep
from causalcone.runners.sweep.driver import Driver
from causalcone.runners.sweep.inputs.facts_table import FACTS, fact_table, facts_of

MODEL = Path(__file__).parents[1] / "guards" / "artifacts" / "model"
ZEROING = f"""
model = "{MODEL}"
filter.completes = false
filter.erasable = 0.0

[zero]
states = ["mlp:1"]
"""


def test_the_table_of_facts_has_all_of_them(tmp_path: Path) -> None:
    for name, records in FORMATS.items():
        (tmp_path / "facts.json").write_text(json.dumps(records))
        facts = cc.load_facts(tmp_path / "facts.json")
        assert facts_of(fact_table(facts)) == facts, name


def test_a_sweep_says_what_its_facts_are(tmp_path: Path) -> None:
    row = {("name" if key == "subject" else key): value for key, value in WIKIBIGEDIT.items()}
    (tmp_path / "facts.json").write_text(json.dumps([row]))
    (tmp_path / "zero.toml").write_text(f'facts = "{tmp_path}/facts.json"\ncolumns = {{ subject = "name" }}\n{ZEROING}')
    console = Console(file=io.StringIO(), width=400)
    out = tmp_path / "out"
    assert Driver(load_sweep(str(tmp_path / "zero.toml")), str(out), console).run().status == "complete"
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"facts: 1 of {tmp_path}/facts.json; schema: flat records" in told
    assert "recognised by: named columns subject=name" in told
    assert json.loads((out / "run.json").read_text())["configuration"]["columns"] == {"subject": "name"}
    assert (out / FACTS).exists()


def test_configurations_of_before_are_the_same() -> None:
    assert "columns" not in load_sweep("hase2023-zsre").result_config


def test_zsre_towards_the_true_answer_has_a_problem_in_which_that_is_possible() -> None:
    as_it_is = ["zsre_form=meng", "edit.problems=none"]
    assert load_sweep("hase2023-zsre", as_it_is).edit.problems == ("fact_amplification",)  # type: ignore[attr-defined]
    for changes in (["edit.problems=none"], ["zsre_form=alt", "edit.problems=none"], ["zsre_form=meng"]):
        assert load_sweep("hase2023-zsre", changes).edit.problems == ("error_injection",)  # type: ignore[attr-defined]
