"""The command line: one word per capability, the same words as the API."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from causalcone.engine.errors import CausalconeError
from causalcone.runners.commands import analyze as cli_analyze
from causalcone.runners.commands import data as cli_data
from causalcone.runners.commands import sweep as cli_sweep
from causalcone.runners.commands import tune as cli_tune
from causalcone.runners.options import (
    CollectingOptions,
    ComputeOptions,
    EditingOptions,
    IntegrationOptions,
    MomentsFileOptions,
    OutputOptions,
    SamplingOptions,
    ScoringOptions,
    SourceOptions,
    StreamableSourceOptions,
    TextOptions,
    TracingOptions,
    ZeroingOptions,
    takes,
)

if TYPE_CHECKING:  # commands import what they need, so that help is there at once
    import polars as pl

    from causalcone.runners.edits.study import EditsDone
    from causalcone.runners.results.folder import ResultFolder
    from causalcone.runners.results.table_run import RunSummary

_Done = TypeVar("_Done", "RunSummary", "EditsDone")

app = typer.Typer(
    name="causalcone",
    help="Where language models keep facts, and what editing them there does: causal tracing, zeroing, integrated "
    "gradients and model editing, computed only where an intervention reaches.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
cli_sweep.add_to(app)
cli_tune.add_to(app)
cli_analyze.add_to(app)
cli_data.add_to(app)
_shown: set[str] = set()

_TRACE_EXAMPLES = """
[bold]Examples[/bold]

causalcone trace --model gpt2-xl --facts counterfact.json --out traces-xl

causalcone trace --model ./my-model --facts facts.jsonl --state hidden:1 --state mlp:5 --sigma 0.1 --out run --plot 5

causalcone trace --model demo --facts demo --sever mlp --tokens subject_last --out severed

causalcone trace --model demo --facts demo --state heads:1 --noise t --dof 5 --noise-texts text.txt --out heads
"""
_PLAN_EXAMPLES = """
[bold]Examples[/bold]

causalcone plan --model gpt2-xl --facts counterfact.json

causalcone plan --model demo --facts demo --state mlp:5 --memory 2GiB

causalcone plan --model ./large-model --facts counterfact.json --weights stream --memory 16GiB
"""
_ZERO_EXAMPLES = """
[bold]Examples[/bold]

causalcone zero --model gpt2-xl --facts counterfact.json --out zeroed --plot

causalcone zero --model demo --facts demo --state mlp:1 --state attn:3 --tokens last --out zeroed
"""
_GRADIENT_EXAMPLES = """
[bold]Examples[/bold]

causalcone gradients --model gpt2-xl --facts counterfact.json --limit 20 --out gradients --plot 3

causalcone gradients --model demo --facts demo --kind hidden --baseline corrupted --out gradients
"""
_MOMENT_EXAMPLES = """
[bold]Examples[/bold]

causalcone moments --model gpt2-xl --texts wikipedia.txt --layers 13,14,15,16,17 --out xl.safetensors

causalcone moments --model gpt2-xl --dataset wikitext --dataset-config wikitext-103-raw-v1 --out xl.safetensors
"""
_EDIT_EXAMPLES = """
[bold]Examples[/bold]

causalcone edit --model gpt2-xl --facts counterfact.json --method rome --preset gpt2-xl --moments m.safetensors --out xl

causalcone edit --model ./my-model --facts facts.jsonl --method finetune:1 --method finetune:5 --layers 0,8 --out edits

causalcone edit --model demo --facts demo --method memit:3 --preset demo --moments demo --essence --out edits --plot

causalcone edit --model demo --facts demo --method rome --set clamp=2 --texts demo --keep-deltas --out edits

causalcone edit --model demo --facts demo --method memit_joint:3 --layers 1 --preset demo --moments demo --out mass
"""


@app.command(epilog=_TRACE_EXAMPLES)
@takes(StreamableSourceOptions, OutputOptions, TracingOptions, SamplingOptions)
def trace(
    source: StreamableSourceOptions,
    output: OutputOptions,
    tracing: TracingOptions,
    sampling: SamplingOptions,
    plot: Annotated[int, typer.Option(help="Draw heat maps of the first so many facts, and averages.", min=0)] = 0,
) -> None:
    """Trace facts: restore one window of layers at a time in noise-corrupted runs, and see what brings the answer back.

    Writes OUT/traces (Parquet, one row per fact, state, layer and token) and OUT/run.json.
    """
    from causalcone.analysis.effects import average_indirect_effect
    from causalcone.analysis.layer_effects import joint_effects
    from causalcone.runners.commands import localize as studies
    from causalcone.runners.results.table_run import carry_out
    from causalcone.runners.show import tables as summary
    from causalcone.runners.show.figures import draw_traces

    def figures(done: RunSummary) -> list[Path]:
        return draw_traces(output.out, done.first, tracing.joint) if plot else []

    def tables(done: RunSummary) -> list[Any]:
        if tracing.joint:
            return summary.layer_tables(joint_effects(done.path), "Effect of restoring tokens together")
        return summary.effect_tables(average_indirect_effect(done.path))

    prepared = studies.tracing(source, tracing, sampling)
    _run(partial(carry_out, prepared.study, keep=plot), "traces", prepared.configuration, output, figures, tables)


@app.command(epilog=_PLAN_EXAMPLES)
@takes(StreamableSourceOptions, TracingOptions, SamplingOptions)
def plan(source: StreamableSourceOptions, tracing: TracingOptions, sampling: SamplingOptions) -> None:
    """Show what tracing would take: passes, rows, operations, memory and time; no fact is computed."""
    from causalcone.runners.commands.localize import tracing_plan
    from causalcone.runners.show.forecast import forecast_table

    inputs, planned = tracing_plan(source, tracing, sampling)
    Console().print(forecast_table(inputs.tracer, planned))


@app.command(epilog=_ZERO_EXAMPLES)
@takes(StreamableSourceOptions, OutputOptions, ZeroingOptions)
def zero(
    source: StreamableSourceOptions,
    output: OutputOptions,
    zeroing: ZeroingOptions,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the mean effect by layer.")] = False,
) -> None:
    """Zero representations: set one window of layers to zero at the subject, and see how much of the answer is lost.

    Writes OUT/traces (Parquet, one row per fact, state and layer) and OUT/run.json.
    """
    from causalcone.analysis.layer_effects import zeroing_curve
    from causalcone.runners.commands import localize as studies
    from causalcone.runners.results.table_run import carry_out
    from causalcone.runners.show import tables as summary
    from causalcone.runners.show.figures import draw_zeroing

    def figures(done: RunSummary) -> list[Path]:
        return draw_zeroing(output.out) if plot else []

    def tables(done: RunSummary) -> list[Any]:
        return summary.layer_tables(zeroing_curve(done.path), "Share of p(target) lost by zeroing", ".3f")

    prepared = studies.zeroing(source, zeroing)
    _run(partial(carry_out, prepared.study), "traces", prepared.configuration, output, figures, tables)


@app.command(epilog=_GRADIENT_EXAMPLES)
@takes(SourceOptions, OutputOptions, IntegrationOptions, SamplingOptions)
def gradients(
    source: SourceOptions,
    output: OutputOptions,
    choice: IntegrationOptions,
    sampling: SamplingOptions,
    plot: Annotated[int, typer.Option(help="Draw heat maps of the first so many facts.", min=0)] = 0,
) -> None:
    """Integrate gradients: how much of the answer each state accounts for, along the line from a baseline to its value.

    Writes OUT/gradients (Parquet, one row per fact, kind, layer and token) and OUT/run.json. With the baseline zero,
    the total of a hidden state is far from what it should be (column gap), since the norm behind it undoes any scale.
    """
    from causalcone.analysis.gradients import gradient_summary
    from causalcone.runners.commands import localize as studies
    from causalcone.runners.results.table_run import carry_out
    from causalcone.runners.show import tables as summary
    from causalcone.runners.show.figures import draw_gradients

    prepared = studies.gradients(source, choice, sampling)

    def figures(done: RunSummary) -> list[Path]:
        return draw_gradients(output.out, done.first, prepared.inputs.facts, prepared.inputs.tracer)

    def tables(done: RunSummary) -> list[Any]:
        by_kind = gradient_summary(done.path)
        needs_note = choice.baseline == "zero" and "hidden" in by_kind["kind"]
        return [summary.gradient_table(by_kind), *[summary.GAP_NOTE] * needs_note]

    _run(partial(carry_out, prepared.study, keep=plot), "gradients", prepared.configuration, output, figures, tables)


@app.command(epilog=_MOMENT_EXAMPLES)
@takes(ComputeOptions, TextOptions, CollectingOptions, MomentsFileOptions)
def moments(
    computing: ComputeOptions, texts: TextOptions, choice: CollectingOptions, target: MomentsFileOptions
) -> None:
    """Collect second moments, which ROME and MEMIT need: how much MLP keys have of each direction, over running text.

    Writes OUT (safetensors), with what model and texts they are of. What is interrupted goes on where it was.
    """
    from causalcone.runners.edits.moments import collect_to_file

    said = collect_to_file(computing, texts, choice, target)
    if not target.quiet:
        Console().print(said, highlight=False)


@app.command(epilog=_EDIT_EXAMPLES)
@takes(SourceOptions, EditingOptions, ScoringOptions, OutputOptions)
def edit(
    source: SourceOptions,
    choice: EditingOptions,
    scoring: ScoringOptions,
    output: OutputOptions,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the mean scores by layer.")] = False,
) -> None:
    """Edit facts at every chosen layer by ROME, MEMIT or constrained fine-tuning, and score every edited model.

    Facts are edited one by one; memit_joint edits all of them at once.

    Writes OUT/edits, OUT/probes and OUT/metrics (Parquet; a row per edit, per prompt of it and per metric of it) and
    OUT/run.json. No weight of the model is changed.
    """
    from causalcone.runners.edits.inputs import editing
    from causalcone.runners.show import edit_tables as edit_summary
    from causalcone.runners.show.figures import draw_scores

    prepared = editing(source, choice, scoring, output)

    def scores() -> pl.DataFrame:
        return edit_summary.scores_of(output.out, prepared.study.plan.aggregate, scoring.essence)

    def figures(done: EditsDone) -> list[Path]:
        return draw_scores(output.out, scores()) if plot else []

    def tables(done: EditsDone) -> list[Any]:
        metrics = edit_summary.metrics_of(output.out, scoring)
        return [*edit_summary.score_tables(scores()), *metrics, *edit_summary.failed_lines(done.failed)]

    _run(prepared.study.carry_out, "edits", prepared.configuration, output, figures, tables, filtered=prepared.filtered)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-results"),
    facts: Annotated[int, typer.Option(help="How many facts of the demo world to trace.", min=1)] = 60,
    edits: Annotated[int, typer.Option(help="How many facts to edit, by every method at every layer.", min=1)] = 10,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")] = False,
) -> None:
    """Train the demo model (once, some minutes), carry the sweep "demo" out on it, and show what is found.

    Traces facts of the demo model's world, edits some of them for every problem by every method, and goes on where it
    was when it ends early.
    """
    from causalcone.runners.commands.demo import run_demo

    finished = run_demo(out, facts, edits, Console(), overwrite)
    if finished.code:
        sys.exit(finished.code)


def _run(
    compute: Callable[[ResultFolder, Console, bool], _Done],
    table: str,
    configuration: Mapping[str, Any],
    output: OutputOptions,
    figures: Callable[[_Done], Iterable[Path]],
    tables: Callable[[_Done], Iterable[Any]],
    **notes: Any,
) -> None:
    """Carry a study out, draw, and show what it says; ``run.json`` keeps the notes."""
    from causalcone.runners.results.folder import ResultFolder

    console = Console()
    with ResultFolder(output.out, configuration, output.overwrite) as folder:
        try:
            done = compute(folder, console, output.quiet)
            drawn: list[Path] = list(figures(done))
        except BaseException:
            console.print(f"stopped; what was finished by now is in {output.out / table}", highlight=False)
            raise
        folder.finish(**done.results, **notes)
    if not output.quiet:
        for each in tables(done):
            console.print(each, highlight=False)
        for line in (done.sentence(), *(f"figure {path}" for path in drawn)):
            console.print(line, highlight=False)


def main() -> None:
    """Run the command line; bad input ends with a message and exit code 2, an interruption with 130."""
    _shown.clear()
    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(standalone_mode=True)
    except CausalconeError as error:
        print(f"causalcone: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Print a warning meant for users, once."""
    if issubclass(category, UserWarning) and str(message) not in _shown:
        _shown.add(str(message))
        print(f"causalcone: {message}", file=sys.stderr)


def _terminate(*_: Any) -> None:
    """End as after an interruption, with what was finished written."""
    sys.exit(143)
