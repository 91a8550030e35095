"""Times sweeps: ``python bench/sweep.py``.

long: 10,000 generated facts of the demo world in the demo model, traced, zeroed and edited at layer 0 by ROME and
fine-tuning in three steps; whether the last thousand take longer, or more memory, than the first. cluster: causal
tracing of 20 CounterFact prompts (generated ones of the same lengths where the file is missing) in a GPT-2-small shape
with random weights, by this process with two threads and by two Ray workers with one thread each. Results are written
after each.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import command
import psutil
import pyarrow as pa
import torch
from measure import say
from report import Growing, environment, where
from rich.console import Console
from workload import DATA, SHAPES, gpt2, prompts, random_model

from causalcone.runners.demo.world import World
from causalcone.runners.facts.files import save_facts
from causalcone.runners.results.store import Store
from causalcone.runners.sweep.cluster.ray_executor import executors
from causalcone.runners.sweep.driver import COMPLETE, Driver
from causalcone.runners.sweep.executor import Executor, LocalExecutor, Stop, UnitResult
from causalcone.runners.sweep.inputs.settings import Sweep
from causalcone.runners.sweep.inputs.units import Unit
from causalcone.runners.sweep.stages import as_sweep
from causalcone.runners.sweep.worker import Worker

LONG, CLUSTER = "long", "cluster"
METHODS = ("rome", "finetune:1")
STATES = ("hidden:1", "mlp:10", "attn:10")
FACTS_PER_SUBJECT = 3


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    report = {
        "title": "Sweeps",
        **environment(torch.device("cpu")),
        "long": f"{options.facts} facts, units of {options.unit}",
        "cluster": f"{options.prompts} prompts, {options.workers} workers",
    }
    studies = {LONG: partial(measure_long, options), CLUSTER: partial(measure_cluster, options)}
    growing = Growing(report, list(studies), options.out, "sweeps", "sweeps" if options.record else None, written)
    command.run_each({name: studies[name] for name in options.studies}, growing)


# --- ten thousand facts ---


@dataclass(frozen=True)
class Step:
    """A unit as it was carried out: from the unit before it, and the most memory that the process held meanwhile."""

    unit: Unit
    seconds: float
    peak_bytes: int


class Watched(LocalExecutor):
    """An executor that is watched."""

    def __init__(self, worker: Worker, steps: list[Step]) -> None:
        super().__init__(worker)
        self.steps = steps

    def run(self, units: Sequence[Unit], stop: Stop) -> Iterator[UnitResult]:
        with highest_memory() as peak:
            began = time.perf_counter()
            for outcome in super().run(units, stop):
                yield outcome  # what the driver does with it counts too
                ended = time.perf_counter()
                self.steps.append(Step(outcome.unit, ended - began, peak()))
                began = ended


@contextmanager
def highest_memory() -> Iterator[Callable[[], int]]:
    """What gives the most memory that the process held since it was asked last."""
    process, ended, most = psutil.Process(), threading.Event(), [0]

    def sample() -> None:
        while not ended.wait(0.005):
            most[0] = max(most[0], process.memory_info().rss)

    def ask() -> int:
        found, most[0] = max(most[0], process.memory_info().rss), 0
        return found

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield ask
    finally:
        ended.set()
        sampler.join()


def measure_long(options: argparse.Namespace) -> dict[str, Any]:
    steps: list[Step] = []
    with TemporaryDirectory() as folder:
        facts = Path(folder) / "facts.json"
        World.generate(subjects=-(-options.facts // FACTS_PER_SUBJECT)).write(facts)
        sweep = as_sweep(
            {
                "model": "demo",
                "facts": str(facts),
                "limit": options.facts,
                "filter": {"completes": False, "erasable": 0.0},
                "units": {"facts": options.unit, "edits": options.unit},
                "noise": {"samples": 3},
                "trace": {"states": ("hidden:1",)},
                "zero": {"states": ("mlp:3",)},
                "edit": {"methods": METHODS, "set": ("steps=3",), "layers": (0,), "essence": False},
                "moments": {"file": "demo"},
            }
        )
        began = time.perf_counter()
        carry_out(sweep, Path(folder) / "out", lambda sweep, place: Watched(Worker(sweep, place), steps))
        seconds = time.perf_counter() - began
    part = min(1000, options.facts // 2)
    stages: dict[str, list[Step]] = {}
    for step in steps:
        if step.unit.facts:
            stages.setdefault(f"{step.unit.stage} {step.unit.group}".strip(), []).append(step)
    return {
        "facts": options.facts,
        "seconds": seconds,
        "compared": part,
        "stages": [{"name": name, **ends(own, part)} for name, own in stages.items()],
    }


def ends(steps: Sequence[Step], part: int) -> dict[str, float]:
    """Seconds per fact and the most memory over the first so many facts and over the last, and those of all."""
    found: dict[str, float] = {}
    for name, own in (("first", taken(steps, part)), ("last", taken(steps[::-1], part)), ("all", steps)):
        facts = sum(len(step.unit.facts) for step in own)
        found[f"{name}_seconds_per_fact"] = sum(step.seconds for step in own) / facts
        found[f"{name}_peak_bytes"] = max(step.peak_bytes for step in own)
    return found


def taken(steps: Sequence[Step], facts: int) -> list[Step]:
    """The first units that have so many facts."""
    chosen: list[Step] = []
    for step in steps:
        if sum(len(each.unit.facts) for each in chosen) >= facts:
            break
        chosen.append(step)
    return chosen


# --- a cluster ---


class Timed:
    """An executor whose stages are timed."""

    def __init__(self, executor: Executor, seconds: dict[str, float]) -> None:
        self.executor, self.seconds = executor, seconds
        self.model_info, self.bad_facts = executor.model_info, executor.bad_facts

    def run(self, units: Sequence[Unit], stop: Stop) -> Iterator[UnitResult]:
        began = time.perf_counter()
        yield from self.executor.run(units, stop)
        self.seconds[units[0].stage] = time.perf_counter() - began


def measure_cluster(options: argparse.Namespace) -> dict[str, Any]:
    shape = SHAPES["toy" if options.toy else "GPT-2 small"]
    ways: dict[str, dict[str, float]] = {"alone": {}, "cluster": {}}
    with TemporaryDirectory() as name:
        folder = Path(name)
        facts, tokenizer, source = prompts(options.data, options.prompts, shape["vocab_size"])
        random_model(gpt2(shape), torch.float32, torch.device("cpu")).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        save_facts(facts, folder / "facts.jsonl")
        sweep = as_sweep(
            {
                "model": str(folder / "model"),
                "facts": str(folder / "facts.jsonl"),
                "filter": {"completes": False, "erasable": 0.0},
                "units": {"facts": options.prompts_unit},
                "trace": {"states": STATES},
            }
        )
        for way, address in (("alone", None), ("cluster", "local")):
            say(f"  {way}")
            with executors(address, options.workers if address else None) as make:

                def timed(sweep: Sweep, place: str, way: str = way, make: Any = make) -> Executor:
                    executor = LocalExecutor(Worker(sweep, place)) if make is None else make(sweep, place)
                    return Timed(executor, ways[way])

                carry_out(sweep, folder / way, timed)
        apart = difference(*(Store.open(folder / way) for way in ways))
    seconds = {way: stages["trace"] for way, stages in ways.items()}
    return {
        "prompts": {"source": source, "count": len(facts)},
        "threads": {"alone": options.threads, "each worker": max(1, options.threads // options.workers)},
        "workers": options.workers,
        "seconds": seconds,
        "facts_per_second": {way: len(facts) / each for way, each in seconds.items()},
        "ratio": seconds["alone"] / seconds["cluster"],
        "largest_difference": apart,
    }


def difference(one: Store, other: Store) -> float:
    """The largest difference of a probability between the traces of two sweeps of the same states."""
    first, second = (
        pa.concat_tables(store.read_table(name) for name in sorted(store.names("traces"))) for store in (one, other)
    )
    keys = ("fact_id", "kind", "window", "layer", "token")
    if first.select(keys) != second.select(keys):
        raise ValueError("the two sweeps traced other states")
    return max(abs(p - q) for p, q in zip(first["p_patched"].to_pylist(), second["p_patched"].to_pylist(), strict=True))


# --- both ---


def carry_out(sweep: Sweep, out: Path, make_executor: Callable[[Sweep, str], Executor]) -> None:
    finished = Driver(sweep, str(out), Console(stderr=True), make_executor=make_executor).run()
    if finished.status != COMPLETE:
        raise RuntimeError(f"the sweep is {finished.status}: {finished.failed}")


def written(report: dict[str, Any]) -> str:
    """The results as tables."""
    lines = [
        f"### {report['title']}",
        "",
        f"{report['date']}, {where(report['machine'])}; torch {report['versions']['torch']}, causalcone "
        f"{report['versions']['commit']}.",
        "",
    ]
    for result in report["results"]:
        if "skipped" in result:
            lines += [f"Not measured: {result['name']}: {result['skipped']}.", ""]
        else:
            lines += {LONG: written_long, CLUSTER: written_cluster}[result["name"]](result)
    return "\n".join(lines)


def written_long(result: dict[str, Any]) -> list[str]:
    """One line per stage."""
    part = f"{result['compared']:,}"
    lines = [
        f"{result['facts']:,} generated facts of the demo world in the demo model, in {result['seconds']:,.0f} s. "
        "Milliseconds per fact with what the sweep itself does between units, and the most memory that the process "
        "held:",
        "",
        f"| stage | first {part} facts | last {part} | last to first | memory, first {part} | memory, last {part} |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for stage in (*result["stages"], together(result["stages"])):
        first, last = stage["first_seconds_per_fact"], stage["last_seconds_per_fact"]
        memory = (f"{stage[f'{end}_peak_bytes'] / 2**20:,.0f} MiB" for end in ("first", "last"))
        cells = [stage["name"], f"{1000 * first:.2f}", f"{1000 * last:.2f}", f"{last / first:.3f}", *memory]
        lines.append(f"| {' | '.join(cells)} |")
    told = "Early in a stage passes of shapes that were not met before are planned, in a part of the first facts' time."
    return [*lines, "", told, ""]


def together(stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All stages as one."""
    of = {"seconds_per_fact": sum, "peak_bytes": max}
    found = {
        f"{end}_{name}": add(stage[f"{end}_{name}"] for stage in stages)
        for end in ("first", "last")
        for name, add in of.items()
    }
    return {"name": "all", **found}


def written_cluster(result: dict[str, Any]) -> list[str]:
    alone, cluster = (result["facts_per_second"][way] for way in ("alone", "cluster"))
    return [
        f"Causal tracing of {result['prompts']['source']} in a GPT-2-small shape, states {', '.join(STATES)}: "
        f"{alone:.3g} facts/s in one process with {result['threads']['alone']} threads, {cluster:.3g} facts/s by "
        f"{result['workers']} Ray workers with {result['threads']['each worker']} thread each, "
        f"{result['ratio']:.0%} of it; largest difference {result['largest_difference']:.1e}.",
        "",
    ]


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_names(options, "--studies", (LONG, CLUSTER))
    options.add_argument("--facts", type=int, default=10_000, help="facts of the long sweep (10,000)")
    options.add_argument("--unit", type=int, default=100, help="facts, and edits, of its units (100)")
    options.add_argument("--prompts", type=int, default=20, help="prompts on the cluster (20)")
    options.add_argument("--prompts-unit", type=int, default=2, help="prompts of its units (2)")
    options.add_argument("--workers", type=int, default=2, help="workers of the cluster (2)")
    options.add_argument("--threads", type=int, default=2, help="threads of this process (2)")
    options.add_argument("--data", type=Path, default=DATA, help="folder of counterfact_prompts.json, gpt2-tokenizer/")
    command.add_output(options, "a tiny model on the cluster, to try the script")
    return options.parse_args()


if __name__ == "__main__":
    main()
