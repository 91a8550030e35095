"""The main job on the embedded default: where are the demo world's facts localised in the demo model, and what does
editing them there do?"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from causalcone.analysis.effects import average_indirect_effect
from causalcone.analysis.layer_effects import severed_effects, zeroing_curve
from causalcone.engine.editing.editor import Editor
from causalcone.engine.facts import Fact
from causalcone.engine.states import State
from causalcone.engine.tables import TRACE_SCHEMA
from causalcone.engine.tracing import Tracer
from causalcone.runners.demo_model import demo_folder, demo_model, demo_moments, demo_world
from causalcone.runners.edit_settings import preset_plan
from causalcone.runners.edit_study import EditStudy
from causalcone.runners.edit_summary import best_sentence, score_tables, scores_of
from causalcone.runners.figures import draw_scores, draw_severed, draw_traces, draw_zeroing
from causalcone.runners.results import ResultFolder, versions
from causalcone.runners.study import Study, carry_out
from causalcone.runners.summary import effect_tables, find_sites, severed_sentence, zeroing_sentence

STATES = (State("hidden", 1), State("mlp", 3), State("attn", 3))
SEVERED = ("mlp", "attn")
PLOTS = 6
PRESET, PROBLEM, METHODS = "demo", "error_injection", ("rome", "memit:3", "finetune:1")
_TABLES = ("traces", "severed", "zeroed", "edits", "probes", "metrics")


def run_demo(out: Path, count: int, console: Console, overwrite: bool = False, edited: int = 100) -> None:
    """Trace and zero ``count`` facts of the demo world, and edit ``edited``, into ``out``, or show what is there from
    the same run before."""
    model, tokenizer = demo_model()
    tracer = Tracer(model, tokenizer)
    facts = demo_facts(count)
    options = {"samples": 10, "sigma": tracer.noise_level(demo_world().facts, "3sd"), "seed": 1, "target": "label"}
    states = [str(state) for state in STATES]
    study = demo_edits(edited)
    editing = {"facts_edited": edited, **study.configuration}
    configuration = {
        "command": "demo", "model": demo_folder().name, "facts": len(facts), "states": states, **options,
        "editing": editing,
    }  # fmt: skip
    if not _holds(out, configuration):
        with ResultFolder(out, configuration, overwrite or _is_demo_run(out)) as folder:
            seconds = _compute(tracer, facts, options, folder, console)
            console.print(f"{len(facts)} facts in {seconds:.1f} s", highlight=False)
            done = study.carry_out(folder, console)
            draw_scores(out, scores_of(out, study.plan.aggregate, essence=False))
            folder.finish(facts=len(facts), seconds=round(seconds, 3), editing=done.results)
        console.print(done.sentence(), highlight=False)
    show(out, console, study.plan.aggregate)


def demo_facts(count: int) -> list[Fact]:
    """Facts of the demo world, evenly over its relations."""
    every = demo_world().facts
    if count > len(every):
        warnings.warn(f"the demo world has {len(every)} facts, fewer than {count}; all are taken", stacklevel=2)
    step = max(1, len(every) // count)
    return every[::step][:count]


def demo_edits(count: int) -> EditStudy:
    """Error injection into facts of the demo world at all layers, by every method."""
    editor = Editor(*demo_model(), demo_moments())
    return EditStudy(editor, editor.requests(demo_facts(count), PROBLEM), preset_plan(PRESET, METHODS, PROBLEM), {})


def _compute(
    tracer: Tracer, facts: list[Fact], options: dict[str, Any], folder: ResultFolder, console: Console
) -> float:
    """Causal tracing of all tokens, severed tracing of the subjects' last ones, and zeroing; the seconds they took."""

    def study(title: str, table: str, batches: Any) -> Study:
        return Study(title, table, TRACE_SCHEMA, len(facts), batches)

    def severed() -> Any:
        for part in SEVERED:
            yield from tracer.stream(facts, (STATES[0],), tokens="subject_last", sever=part, **options)

    traced = carry_out(study("tracing", "traces", tracer.stream(facts, STATES, **options)), folder, console, keep=PLOTS)
    others = (
        carry_out(study("severed tracing", "severed", severed()), folder, console, quiet=True),
        carry_out(study("zeroing", "zeroed", tracer.stream_zero(facts, (STATES[1],))), folder, console, quiet=True),
    )
    draw_traces(folder.path, traced.first)
    draw_severed(folder.path)
    draw_zeroing(folder.path, "zeroed")
    return traced.seconds + sum(done.seconds for done in others)


def show(out: Path, console: Console, aggregate: str) -> None:
    """Print what the folder's tables say, and where its figures are."""
    averages = average_indirect_effect(out / "traces")
    edits = scores_of(out, aggregate, essence=False)
    for table in (*effect_tables(averages), *score_tables(edits)):
        console.print(table)
    said = (
        find_sites(averages).sentence(),
        severed_sentence(severed_effects(out / "traces", out / "severed")),
        zeroing_sentence(zeroing_curve(out / "zeroed")),
        best_sentence(edits),
        f"tables {', '.join(str(out / table) for table in _TABLES)}; figures:",
        *(f"  {path}" for path in sorted((out / "plots").glob("*.png"))),
    )
    for line in said:
        console.print(line, highlight=False)


def _holds(out: Path, configuration: dict[str, Any]) -> bool:
    """Whether the folder holds the finished run of exactly this configuration."""
    run = _read_run(out)
    wanted = {**configuration, "versions": versions(), "status": "complete"}
    same = all(run.get(name) == json.loads(json.dumps(value)) for name, value in wanted.items())
    return same and all(any((out / table).glob("*.parquet")) for table in _TABLES)


def _is_demo_run(out: Path) -> bool:
    return _read_run(out).get("command") == "demo"


def _read_run(out: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((out / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
