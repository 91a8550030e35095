"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0

Report = Callable[[int, int], None]


@contextmanager
def fact_progress(console: Console, title: str, quiet: bool = False) -> Iterator[Report]:
    """A function of (facts done, all facts) that shows both, facts per second and the time left."""
    if quiet:
        yield lambda done, total: None
    elif console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task(title, total=None, rate="")
            started = time.monotonic()

            def show(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total, rate=_rate(done, started))

            yield show
    else:
        yield _plain(console, title)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _plain(console: Console, title: str) -> Report:
    started = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= PLAIN_SECONDS:
            last = now
            left = f", {(now - started) / done * (total - done):.0f} s left" if 0 < done < total else ""
            console.print(f"{title}: {done}/{total} facts, {_rate(done, started)}{left}", highlight=False)

    return show


def _rate(done: int, started: float) -> str:
    seconds = time.monotonic() - started
    return f"{done / seconds:.2f} facts/s" if done and seconds > 0 else "... facts/s"
