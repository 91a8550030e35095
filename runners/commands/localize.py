"""The commands that localize facts: ``trace``, ``plan``, ``zero`` and ``gradients``.

Commands import what they need when they run, so that help is there at once.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Option

from causalcone.runners.commands.shared import check_place, takes
from causalcone.runners.options import (
    AnswerOptions,
    IntegratedOptions,
    IntegrationOptions,
    PromptOutputOptions,
    SamplingOptions,
    TracedOptions,
    TracingOptions,
    ZeroingOptions,
)


@takes(TracedOptions, PromptOutputOptions, TracingOptions, SamplingOptions, AnswerOptions)
def trace(
    source: TracedOptions,
    output: PromptOutputOptions,
    tracing: TracingOptions,
    sampling: SamplingOptions,
    answers: AnswerOptions,
    plot: Annotated[int, Option(help="Draw heat maps of the first N facts, and averages.", min=0)] = 0,
) -> None:
    """Trace facts: restore one window of layers at a time in noise-corrupted runs, and see what brings the answer back.

    Writes OUT/traces (Parquet, one row per fact, state, layer and token) and OUT/run.json.
    """
    from causalcone.analysis.effects import average_indirect_effect
    from causalcone.analysis.layer_effects import joint_effects
    from causalcone.runners.commands.localize_runs import prepare_tracing
    from causalcone.runners.show.figures import draw_traces
    from causalcone.runners.show.tables import effect_tables, layer_tables

    def tables(path: Path) -> Iterable[Any]:
        if tracing.joint:
            return layer_tables(joint_effects(path, **vars(answers)), "Effect of restoring tokens together")
        return effect_tables(average_indirect_effect(path, **vars(answers)))

    def draw(folder: Path, first: list[Any], table: Path) -> Iterable[Path]:
        return draw_traces(folder, first, table, tracing.joint, **vars(answers)) if plot else []

    check_place(source, output)
    run = prepare_tracing(source, tracing, sampling)
    run.carry_out(output, tables, draw, plot, **vars(answers))


@takes(TracedOptions, TracingOptions, SamplingOptions)
def plan(source: TracedOptions, tracing: TracingOptions, sampling: SamplingOptions) -> None:
    """Show what tracing would take: passes, rows, operations, memory and time; no fact is computed."""
    from causalcone.runners.commands.localize_runs import tracing_plan
    from causalcone.runners.show.forecast import forecast_table

    inputs, planned = tracing_plan(source, tracing, sampling)
    Console().print(forecast_table(inputs.tracer, planned))


@takes(TracedOptions, PromptOutputOptions, ZeroingOptions, AnswerOptions)
def zero(
    source: TracedOptions,
    output: PromptOutputOptions,
    zeroing: ZeroingOptions,
    answers: AnswerOptions,
    plot: Annotated[bool, Option("--plot", help="Draw the mean effect by layer.")] = False,
) -> None:
    """Zero representations: set one window of layers to zero at the subject, and see how much of the answer is lost.

    Writes OUT/traces (Parquet, one row per fact, state and layer) and OUT/run.json.
    """
    from causalcone.analysis.layer_effects import zeroing_curve
    from causalcone.runners.commands.localize_runs import prepare_zeroing
    from causalcone.runners.show.figures import draw_table
    from causalcone.runners.show.tables import layer_tables

    check_place(source, output)
    prepare_zeroing(source, zeroing).carry_out(
        output,
        lambda path: layer_tables(zeroing_curve(path, **vars(answers)), "Share of p(target) lost by zeroing", "z.3f"),
        lambda folder, _, table: draw_table(folder, "zeroing", table, **vars(answers)) if plot else [],
        **vars(answers),
    )


@takes(IntegratedOptions, PromptOutputOptions, IntegrationOptions, SamplingOptions)
def gradients(
    source: IntegratedOptions,
    output: PromptOutputOptions,
    integration: IntegrationOptions,
    sampling: SamplingOptions,
    plot: Annotated[int, Option(help="Draw heat maps of the first N facts.", min=0)] = 0,
) -> None:
    """Integrate gradients: how much of the answer each state accounts for, along the line from a baseline to its value.

    Writes OUT/gradients (Parquet, one row per fact, kind, layer and token) and OUT/run.json. With the baseline zero,
    the total of a hidden state is far from what it should be (column gap), since the norm after it undoes any scale.
    """
    from causalcone.analysis.layer_effects import gradient_summary
    from causalcone.runners.commands.localize_runs import prepare_gradients
    from causalcone.runners.show.figures import draw_gradients
    from causalcone.runners.show.tables import GAP_NOTE, gradient_table

    def tables(path: Path) -> Iterable[Any]:
        by_kind = gradient_summary(path)
        note = [GAP_NOTE] if integration.baseline == "zero" and "hidden" in by_kind["kind"] else []
        return [gradient_table(by_kind), *note]

    check_place(source, output)
    run = prepare_gradients(source, integration, sampling)
    facts, tracer = run.inputs.facts, run.inputs.tracer
    run.carry_out(output, tables, lambda folder, first, _: draw_gradients(folder, first, facts, tracer), plot)


COMMANDS = {
    trace: """
causalcone trace --model gpt2-xl --facts counterfact.json --out traces-xl
causalcone trace --model ./my-model --facts facts.jsonl --state hidden:1 --state mlp:5 --sigma 0.1 --out run --plot 5
causalcone trace --model demo --facts demo --sever mlp --tokens subject_last --out severed
causalcone trace --model demo --facts demo --state heads:1 --noise t --dof 5 --noise-texts text.txt --out heads
""",
    plan: """
causalcone plan --model gpt2-xl --facts counterfact.json
causalcone plan --model demo --facts demo --state mlp:5 --memory 2GiB
causalcone plan --model ./large-model --facts counterfact.json --weights stream --memory 16GiB
""",
    zero: """
causalcone zero --model gpt2-xl --facts counterfact.json --out zeroed --plot
causalcone zero --model demo --facts demo --state mlp:1 --state attn:3 --tokens last --out zeroed
""",
    gradients: """
causalcone gradients --model gpt2-xl --facts counterfact.json --limit 20 --out gradients --plot 3
causalcone gradients --model demo --facts demo --kind hidden --baseline corrupted --out gradients
""",
}
