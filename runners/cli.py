"""The command line: one word per capability, the same words as the API."""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from causalcone.engine.errors import CausalconeError, FactError

app = typer.Typer(
    name="causalcone",
    help="Causal tracing of facts in transformer language models, computed only where an intervention reaches.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_OWN_MODEL = "demo"
_shown: set[str] = set()

Model = Annotated[str, typer.Option(help="Model folder or hub id; 'demo' is the embedded demo model.")]
Facts = Annotated[
    str,
    typer.Option(help="File of facts: CounterFact, zsRE or known-facts JSON, or own JSONL; 'demo' is the demo world."),
]
States = Annotated[
    list[str],
    typer.Option("--state", help="What to restore, KIND:WINDOW with kind hidden, mlp or attn; repeat for several."),
]
Samples = Annotated[int, typer.Option(help="Noise samples to average over.")]
Sigma = Annotated[
    str, typer.Option(help="Noise level: a number, or '3sd' for 3 standard deviations of the subjects' embeddings.")
]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Target = Annotated[str, typer.Option(help="'label': the fact's own target; 'argmax': the model's most likely token.")]
Tokens = Annotated[
    str, typer.Option(help="all, subject_onward, subject, subject_last, last, or indices such as 0,3,-1.")
]
Dtype = Annotated[
    str | None, typer.Option(help="Compute in float64, float32, bfloat16 or float16; the model's own by default.")
]
Device = Annotated[str | None, typer.Option(help="Compute on cpu, cuda, cuda:1, ...; cuda by default where it is.")]
Memory = Annotated[
    str | None, typer.Option(help="Bytes that a pass may take, such as 4GiB; half of what is free by default.")
]
Limit = Annotated[int | None, typer.Option(help="Only the first so many facts.", min=1)]
SkipBad = Annotated[bool, typer.Option("--skip-bad-facts", help="List facts that cannot be traced and go on.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no summary.")]

_TRACE_EXAMPLES = """
[bold]Examples[/bold]

causalcone trace --model gpt2-xl --facts counterfact.json --out traces-xl

causalcone trace --model ./my-model --facts facts.jsonl --state hidden:1 --state mlp:5 --sigma 0.1 --out run --plot 5

causalcone trace --model demo --facts demo --limit 20 --out demo-run --plot 3
"""
_PLAN_EXAMPLES = """
[bold]Examples[/bold]

causalcone plan --model gpt2-xl --facts counterfact.json

causalcone plan --model demo --facts demo --state mlp:5 --memory 2GiB
"""


@app.command(epilog=_TRACE_EXAMPLES)
def trace(
    model: Model,
    facts: Facts,
    out: Out,
    state: States = ["hidden:1", "mlp:10", "attn:10"],  # noqa: B006 (typer copies it)
    samples: Samples = 10,
    sigma: Sigma = "3sd",
    seed: Seed = 1,
    target: Target = "label",
    tokens: Tokens = "all",
    dtype: Dtype = None,
    device: Device = None,
    memory: Memory = None,
    limit: Limit = None,
    skip_bad_facts: SkipBad = False,
    overwrite: Overwrite = False,
    plot: Annotated[int, typer.Option(help="Draw heat maps of the first so many facts.", min=0)] = 0,
    quiet: Quiet = False,
) -> None:
    """Trace facts: restore one window of layers at a time in noise-corrupted runs, and see what brings the answer back.

    Writes OUT/traces (Parquet, one row per fact, state, layer and token) and OUT/run.json.
    """
    from causalcone.runners.results import ResultFolder
    from causalcone.runners.summary import effect_table, read_averages
    from causalcone.runners.tracing_run import run_trace

    console = Console()
    tracer, chosen, options = _prepare(
        model, facts, state, samples, sigma, seed, target, tokens, dtype, device, memory, limit, skip_bad_facts
    )
    if not tracer.plan(chosen, **vars(options)).facts:  # all facts are checked before the folder is made
        raise FactError(f"none of the facts of {facts} can be traced")
    configuration = {
        "command": "trace",
        "model": model,
        "facts": facts,
        "sigma_given": sigma,
        "dtype": str(tracer.dtype).removeprefix("torch."),
        "device": str(tracer.device),
        "limit": limit,
        **options.configuration(),
    }
    folder = ResultFolder(out, configuration, overwrite)
    try:
        result = run_trace(tracer, chosen, options, folder, console, plot, quiet)
    except BaseException:
        folder.stop()
        console.print(f"stopped; the facts finished by now are in {out / 'traces'}", highlight=False)
        raise
    if not quiet:
        console.print(effect_table(read_averages(result.traces)))
        rate = f"{result.seconds:.1f} s ({result.facts / result.seconds:.2f} facts/s)"
        console.print(f"{result.facts} facts, {result.rows} rows in {rate} -> {result.traces}", highlight=False)
        for path in result.plots:
            console.print(f"figure {path}", highlight=False)


@app.command(epilog=_PLAN_EXAMPLES)
def plan(
    model: Model,
    facts: Facts,
    state: States = ["hidden:1", "mlp:10", "attn:10"],  # noqa: B006 (typer copies it)
    samples: Samples = 10,
    sigma: Sigma = "3sd",
    seed: Seed = 1,
    target: Target = "label",
    tokens: Tokens = "all",
    dtype: Dtype = None,
    device: Device = None,
    memory: Memory = None,
    limit: Limit = None,
    skip_bad_facts: SkipBad = False,
) -> None:
    """Show what tracing would take: passes, rows, operations, memory and time; no fact is computed."""
    from causalcone.runners.forecast import forecast_table

    tracer, chosen, options = _prepare(
        model, facts, state, samples, sigma, seed, target, tokens, dtype, device, memory, limit, skip_bad_facts
    )
    Console().print(forecast_table(tracer, tracer.plan(chosen, **vars(options))))


@app.command()
def demo(
    out: Out = Path("demo-results"),
    facts: Annotated[int, typer.Option(help="How many facts of the demo world to trace.", min=1)] = 60,
) -> None:
    """Train the demo model (once, some minutes), trace facts of its world, and show where they are localised."""
    from causalcone.runners.demo import run_demo

    run_demo(out, facts, Console())


def _prepare(
    model: str,
    facts: str,
    state: list[str],
    samples: int,
    sigma: str,
    seed: int,
    target: str,
    tokens: str,
    dtype: str | None,
    device: str | None,
    memory: str | None,
    limit: int | None,
    skip_bad_facts: bool,
) -> tuple[Any, list[Any], Any]:
    """The tracer, the facts to trace, and the options; the noise level is that of all facts, whatever the limit."""
    from causalcone.engine.session import as_dtype
    from causalcone.engine.states import as_states
    from causalcone.runners.fact_files import load_facts
    from causalcone.runners.tracing_run import TraceOptions

    on_error: Literal["raise", "skip"] = "skip" if skip_bad_facts else "raise"
    if dtype is not None:
        as_dtype(dtype)
    every = _demo_facts() if _is_demo(facts) else load_facts(facts, on_error=on_error)
    tracer = _tracer(model, dtype, device, memory)
    states = as_states(state, tracer.session.sizes.heads)
    options = TraceOptions(
        states, samples, tracer.noise_level(every, sigma, on_error), seed, target, _parse_tokens(tokens), on_error
    )
    return tracer, every[:limit], options


def _tracer(model: str, dtype: str | None, device: str | None, memory: str | None) -> Any:
    import torch
    import transformers

    from causalcone.engine.tracing import Tracer

    transformers.utils.logging.disable_progress_bar()
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if _is_demo(model):
        from causalcone.runners.demo_model import demo_model

        network, tokenizer = demo_model()
        return Tracer(network, tokenizer, dtype=dtype, device=chosen, memory=memory)
    return Tracer.from_pretrained(model, dtype=dtype, device=chosen, memory=memory)


def _demo_facts() -> list[Any]:
    from causalcone.runners.demo_model import demo_world

    return demo_world().facts


def _is_demo(name: str) -> bool:
    return name == _OWN_MODEL and not Path(name).exists()


def _parse_tokens(tokens: str) -> str | tuple[int, ...]:
    try:
        return tuple(int(index) for index in tokens.split(","))
    except ValueError:
        return tokens


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
