"""Shows what the program does: a sweep of the real model smollm2 or of the demo world's, where facts are localised, and
what editing them there does."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console

from causalcone.analysis.effects import average_indirect_effect
from causalcone.analysis.layer_effects import severed_effects, zeroing_curve
from causalcone.analysis.papers.inputs import PUBLISHED
from causalcone.analysis.sweep_results import Study
from causalcone.engine.localize.tracer import Tracer
from causalcone.runners.commands.analysis_run import write_page
from causalcone.runners.names import path_of
from causalcone.runners.show.edit_tables import best_sentences, rewrite_tables, scores_of
from causalcone.runners.show.figures import draw_gradients, draw_scores, draw_table, draw_traces
from causalcone.runners.show.tables import effect_tables, find_sites, severed_sentence, zeroing_sentence
from causalcone.runners.sweep.config import load_sweep
from causalcone.runners.sweep.driver import Driver, SweepSummary
from causalcone.runners.sweep.inputs.facts_table import read_facts

PAGE = "report.html"
MAPS = 6
"""How many facts heat maps are drawn of."""

TRACES, ZEROED, GRADIENTS = "traces/restore", "traces/zero", "gradients"


@dataclass(frozen=True)
class Demo:
    """A sweep to show, and its folder. facts, edits: how many facts are traced, and how many of these are edited; read:
    how many are read for each that is traced, since models know only some; prompt: a prompt and its subject, whose map
    is shown first."""

    preset: str
    folder: str
    facts: int
    edits: int
    read: int = 1
    prompt: tuple[str, str] | None = None


WORLD = Demo("demo", "world-results", facts=60, edits=10)
REAL = Demo("smollm2-demo", "demo-results", facts=6, edits=3, read=3, prompt=("The capital of France is", "France"))


def run_demo(
    demo: Demo, out: Path | None, facts: int | None, edits: int | None, console: Console, overwrite: bool = False
) -> SweepSummary:
    """Carry the sweep of a demo out in ``out``, of so many facts, or go on with it; draw and show what it found, unless
    it was stopped."""
    out, facts = out or Path(demo.folder), facts or demo.facts
    edits = min(edits or demo.edits, facts)
    traced = [f"{stage}.facts={facts}" for stage in ("trace", "zero")]
    sweep = load_sweep(demo.preset, [f"limit={demo.read * facts}", f"edit.facts={edits}", *traced])
    if demo.prompt is not None and not (out / PAGE).exists():
        console.print(Tracer.from_pretrained(path_of(sweep.model, "model")).show(*demo.prompt, states=["mlp:5"]))
    driver = Driver(sweep, str(out), console, overwrite=overwrite)
    finished = driver.run()
    if finished.signal is not None:
        console.print(f"stopped; the same command goes on from what is in {out}", highlight=False)
        return finished
    stages = set(driver.stages)
    if finished.computed or not (out / PAGE).exists():  # which is written last
        draw_traces(out, _first(out / TRACES), out / TRACES)
        if "sever" in stages:
            draw_table(out, "severed", out / "traces")
        draw_table(out, "zeroing", out / ZEROED)
        if "gradients" in stages:
            tracer = Tracer.from_pretrained(path_of(sweep.model, "model"))
            draw_gradients(out, _first(out / GRADIENTS), read_facts(sweep).facts, tracer)
        draw_scores(out, scores_of(out, "mean", essence=True))
    show(out, console, severed="sever" in stages)
    write_page(Study(out), PUBLISHED, out / PAGE, console)
    console.print(f"{finished.status} after {finished.seconds:.1f} s -> {out}", highlight=False)
    return finished


def show(out: Path, console: Console, severed: bool = True) -> None:
    """Print a summary of the folder's tables, and where its figures are."""
    averages = average_indirect_effect(out / TRACES)
    edits = scores_of(out, "mean", essence=True)
    for table in (*effect_tables(averages), *rewrite_tables(edits)):
        console.print(table)
    tables = sorted(path.name for path in out.iterdir() if path.is_dir() and any(path.rglob("*.parquet")))
    lines = (
        find_sites(averages).sentence(),
        *([severed_sentence(severed_effects(out / "traces"))] if severed else []),
        zeroing_sentence(zeroing_curve(out / ZEROED)),
        *best_sentences(edits),
        f"tables {', '.join(str(out / table) for table in tables)}; figures:",
        *(f"  {path}" for path in sorted(out.rglob("*.png"))),
    )
    for line in lines:
        console.print(line, highlight=False)


def _first(table: Path) -> list[pa.RecordBatch]:
    """The rows of a table's first facts, a batch of each."""
    parts = pa.concat_tables(pq.read_table(part) for part in sorted(table.glob("*.parquet"))[:MAPS])
    facts = (parts.filter(pc.equal(parts["fact_id"], fact_id)) for fact_id in pc.unique(parts["fact_id"])[:MAPS])
    return [batch for fact in facts for batch in fact.combine_chunks().to_batches()]
