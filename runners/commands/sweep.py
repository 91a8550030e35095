"""The commands of whole studies: ``sweep`` and ``status``."""

import sys
from typing import Annotated

import typer
from rich.console import Console

_EXAMPLES = """
causalcone sweep demo --out study
causalcone sweep hase2023-gptj --set facts=counterfact.json --set moments=none --set moments.texts=wiki.txt --out study
causalcone sweep hase2023-gptj --plan --rate 300e12 --known 652
causalcone sweep mine.toml --out s3://bucket/study --cluster auto
"""


def sweep(
    preset: Annotated[str, typer.Argument(help="Name of a preset, or a TOML file.")],
    out: Annotated[
        str | None, typer.Option(help="Folder for the results: a path, or s3://..., gs://..., any fsspec URL.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting, KEY=VALUE, such as edit.layers=[0,4]; 'none' drops it. Repeat."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would take, and compute nothing.")] = False,
    rate: Annotated[
        float | None, typer.Option(help="With --plan: FLOP/s of a device, such as 300e12; measured here by default.")
    ] = None,
    known: Annotated[
        int | None, typer.Option(help="With --plan: how many facts the model knows; all by default.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Compute units again that failed.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Drop the sweep that the folder holds.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(help="Compute on a Ray cluster: auto (what runs here), local (this machine's own), or HOST:PORT."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Workers on the cluster; by default one per GPU, or per two CPUs.", min=1)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no summary.")] = False,
) -> None:
    """Carry a whole study out: filter facts by what the model knows, localize them, edit them, score every edit.

    Whatever ends it (Ctrl-C, a kill, a full disk), the same command goes on where it was. Writes facts.parquet and the
    data sets traces/, gradients/, edits/, probes/, metrics/ of Parquet parts, which can be read at any moment.
    """
    from causalcone.engine.errors import ExperimentError
    from causalcone.runners.sweep.cluster.ray_executor import executors
    from causalcone.runners.sweep.config import load_sweep
    from causalcone.runners.sweep.driver import Driver
    from causalcone.runners.sweep.status import status_of

    configured = load_sweep(preset, changes or ())
    console = Console()
    if plan:
        from causalcone.runners.sweep.forecast import forecast

        forecast(configured, rate, known).show(console)
        return
    if rate is not None or known is not None:
        raise ExperimentError(f"--{'known' if rate is None else 'rate'} goes with --plan; add it, or leave that out")
    if out is None:
        raise ExperimentError("where do results go? Give --out with a folder, or --plan to see what the sweep takes")
    with executors(cluster, workers) as make_executor:
        summary = Driver(configured, out, console, quiet, retry_failed, overwrite, make_executor).run()
    if not quiet:
        status_of(out).show(console)
        console.print(f"{summary.status} after {summary.seconds:.1f} s -> {out}", highlight=False)
    if summary.code:
        sys.exit(summary.code)


def status(place: Annotated[str, typer.Argument(metavar="DIR", help="The folder of a sweep.")]) -> None:
    """Say how far a sweep is, how fast it goes, and what failed."""
    from causalcone.runners.sweep.status import status_of

    status_of(place).show(Console())


COMMANDS = {sweep: _EXAMPLES, status: None}
