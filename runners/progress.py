"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0

Report = Callable[[int, int | None], None]


@contextmanager
def shown_progress(console: Console, title: str, unit: str = "facts", quiet: bool = False) -> Iterator[Report]:
    """A function of (units done, all of them or None) that shows both, how many are done in a second, and the time
    left."""
    if quiet:
        yield lambda done, total: None
    elif console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task(title, total=None, rate="")
            started = time.monotonic()

            def show(done: int, total: int | None) -> None:
                bar.update(task, completed=done, total=total, rate=_rate(done, started, unit))

            yield show
    else:
        yield _plain(console, title, unit)


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


def _plain(console: Console, title: str, unit: str) -> Report:
    started = last = time.monotonic()

    def show(done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= PLAIN_SECONDS:
            last = now
            left = f", {(now - started) / done * (total - done):.0f} s left" if total and 0 < done < total else ""
            of = f"{done}/{total}" if total else f"{done}"
            console.print(f"{title}: {of} {unit}, {_rate(done, started, unit)}{left}", highlight=False)

    return show


def _rate(done: int, started: float, unit: str) -> str:
    seconds = time.monotonic() - started
    if not done or seconds <= 0:
        return f"... {unit}/s"
    rate = done / seconds
    return f"{rate:{'.2f' if rate < 1000 else ',.0f'}} {unit}/s"
