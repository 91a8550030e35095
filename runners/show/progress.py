"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0

Report = Callable[[int, int | None], None]


@contextmanager
def shown_progress(
    console: Console, title: str, unit: str = "facts", quiet: bool = False, begun: int = 0
) -> Iterator[Report]:
    """Yields a function of (units done, all of them or None) that shows both, the units per second, the time left, and
    the memory that the process holds. ``begun`` units were done before."""
    if quiet:
        yield lambda done, total: None
    elif console.is_terminal:
        texts = [TextColumn(f"{{task.{name}}}") for name in ("description", "fields[rate]", "fields[memory]")]
        left = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(texts[0], BarColumn(), MofNCompleteColumn(), *texts[1:], *left, console=console) as bar:
            task = bar.add_task(title, total=None, rate="", memory="")
            started = time.monotonic()

            def show(done: int, total: int | None) -> None:
                rate = _rate(done - begun, started, unit)
                bar.update(task, completed=done, total=total, rate=rate, memory=held_memory())

            yield show
    else:
        yield _plain(console, title, unit, begun)


def _plain(console: Console, title: str, unit: str, begun: int) -> Report:
    started = last = time.monotonic()

    def show(done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= PLAIN_SECONDS:
            last = now
            finished, left = done - begun, ""
            if total and finished and done < total:
                left = f", {(now - started) / finished * (total - done):.0f} s left"
            of = f"{done}/{total}" if total else f"{done}"
            rate = _rate(finished, started, unit)
            console.print(f"{title}: {of} {unit}, {rate}{left}, {held_memory()}", highlight=False)

    return show


def held_memory() -> str:
    """The memory that this process holds, and that on a GPU if it uses one."""
    memory = f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"
    torch = sys.modules.get("torch")  # whoever computes on a GPU has imported it
    if torch is not None and torch.cuda.is_available() and torch.cuda.memory_allocated():
        memory += f", {torch.cuda.memory_reserved() / 2**30:.1f} GiB of the GPU"
    return memory


def _rate(done: int, started: float, unit: str) -> str:
    seconds = time.monotonic() - started
    if not done or seconds <= 0:
        return f"... {unit}/s"
    rate = done / seconds
    return f"{rate:{'.2f' if rate < 1000 else ',.0f'}} {unit}/s"
