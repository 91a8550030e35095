"""The main job on the embedded default: where are the demo world's facts localised in the demo model?"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from causalcone.engine.facts import Fact
from causalcone.engine.states import State
from causalcone.engine.tracing import Tracer
from causalcone.runners.demo_model import demo_folder, demo_model, demo_world
from causalcone.runners.results import ResultFolder, versions
from causalcone.runners.summary import effect_table, find_sites, read_averages
from causalcone.runners.tracing_run import TraceOptions, run_trace

STATES = (State("hidden", 1), State("mlp", 3), State("attn", 3))
PLOTS = 6


def run_demo(out: Path, count: int, console: Console) -> None:
    """Trace ``count`` facts of the demo world into ``out``, or show what is there from the same run before."""
    model, tokenizer = demo_model()
    tracer = Tracer(model, tokenizer)
    facts = demo_facts(count)
    options = TraceOptions(STATES, 10, tracer.noise_level(demo_world().facts, "3sd"), 1, "label", "all")
    configuration = {"command": "demo", "model": demo_folder().name, "facts": len(facts), **options.configuration()}
    if not _holds(out, configuration):
        folder = ResultFolder(out, configuration, overwrite=_is_demo_run(out))
        result = run_trace(tracer, facts, options, folder, console, PLOTS)
        console.print(f"{result.facts} facts in {result.seconds:.1f} s", highlight=False)
    show(out, console)


def demo_facts(count: int) -> list[Fact]:
    """Facts of the demo world, evenly over its relations."""
    every = demo_world().facts
    if count > len(every):
        warnings.warn(f"the demo world has {len(every)} facts, fewer than {count}; all are traced", stacklevel=2)
    step = max(1, len(every) // count)
    return every[::step][:count]


def show(out: Path, console: Console) -> None:
    """Print what the folder's traces say, and where its figures are."""
    averages = read_averages(out / "traces")
    console.print(effect_table(averages))
    console.print(find_sites(averages).sentence(), highlight=False)
    console.print(f"traces {out / 'traces'}, figures:", highlight=False)
    for path in sorted((out / "plots").glob("*.png")):
        console.print(f"  {path}", highlight=False)


def _holds(out: Path, configuration: dict[str, Any]) -> bool:
    """Whether the folder holds the finished run of exactly this configuration."""
    run = _read_run(out)
    wanted = {**configuration, "versions": versions(), "status": "complete"}
    same = all(run.get(name) == json.loads(json.dumps(value)) for name, value in wanted.items())
    return same and any((out / "traces").glob("*.parquet"))


def _is_demo_run(out: Path) -> bool:
    return _read_run(out).get("command") == "demo"


def _read_run(out: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((out / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
