"""The sweep "demo" carried out on the demo model: where its facts are localised, and what editing them there does."""

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
from causalcone.runners.demo.model import demo_model
from causalcone.runners.show.edit_tables import best_sentences, rewrite_tables, scores_of
from causalcone.runners.show.figures import draw_gradients, draw_scores, draw_table, draw_traces
from causalcone.runners.show.tables import effect_tables, find_sites, severed_sentence, zeroing_sentence
from causalcone.runners.sweep.config import load_sweep
from causalcone.runners.sweep.driver import Driver, SweepSummary
from causalcone.runners.sweep.inputs.facts_table import read_facts

PRESET, PAGE = "demo", "report.html"
MAPS = 6
"""How many facts heat maps are drawn of."""

TRACES, ZEROED, GRADIENTS = "traces/restore", "traces/zero", "gradients"
TABLES = ("traces", "gradients", "edits", "probes", "metrics")


def run_demo(out: Path, facts: int, edits: int, console: Console, overwrite: bool = False) -> SweepSummary:
    """Carry the sweep "demo" out in ``out``, of ``facts`` facts of the demo world of which ``edits`` are edited, or go
    on with it; draw and show what it found, unless it was stopped."""
    model, tokenizer = demo_model()
    sweep = load_sweep(PRESET, [f"limit={facts}", f"edit.facts={edits}"])
    finished = Driver(sweep, str(out), console, overwrite=overwrite).run()
    if finished.signal is not None:
        console.print(f"stopped; the same command goes on from what is in {out}", highlight=False)
        return finished
    if finished.computed or not (out / PAGE).exists():  # which is written last
        known = read_facts(sweep).facts
        draw_traces(out, _first(out / TRACES), out / TRACES)
        draw_table(out, "severed", out / "traces")
        draw_table(out, "zeroing", out / ZEROED)
        draw_gradients(out, _first(out / GRADIENTS), known, Tracer(model, tokenizer))
        draw_scores(out, scores_of(out, "mean", essence=True))
    show(out, console)
    write_page(Study(out), PUBLISHED, out / PAGE, console)
    console.print(f"{finished.status} after {finished.seconds:.1f} s -> {out}", highlight=False)
    return finished


def show(out: Path, console: Console) -> None:
    """Print a summary of the folder's tables, and where its figures are."""
    averages = average_indirect_effect(out / TRACES)
    edits = scores_of(out, "mean", essence=True)
    for table in (*effect_tables(averages), *rewrite_tables(edits)):
        console.print(table)
    lines = (
        find_sites(averages).sentence(),
        severed_sentence(severed_effects(out / "traces")),
        zeroing_sentence(zeroing_curve(out / ZEROED)),
        *best_sentences(edits),
        f"tables {', '.join(str(out / table) for table in TABLES)}; figures:",
        *(f"  {path}" for path in sorted(out.rglob("*.png"))),
    )
    for line in lines:
        console.print(line, highlight=False)


def _first(table: Path) -> list[pa.RecordBatch]:
    """The rows of a table's first facts, a batch of each."""
    part = pq.read_table(min(table.glob("*.parquet")))
    facts = (part.filter(pc.equal(part["fact_id"], fact_id)) for fact_id in pc.unique(part["fact_id"])[:MAPS])
    return [batch for fact in facts for batch in fact.combine_chunks().to_batches()]
