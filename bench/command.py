"""What the scripts on the CPU share: their arguments, and going through methods or models one by one."""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from measure import measure_both, say
from naive import Limits
from report import RESULTS, Growing, record, write_json
from studies import Study
from workload import DATA


def parser(doc: str | None, naive_fraction: float, least: int) -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared.add_argument("--prompts", type=int, default=20, help="how many prompts (20)")
    shared.add_argument("--samples", type=int, default=10, help="noise samples (10)")
    shared.add_argument("--threads", type=int, default=2, help="threads, for all ways (2)")
    shared.add_argument(
        "--naive-fraction",
        type=float,
        default=naive_fraction,
        help=f"part of the naive ways that is timed and scaled ({naive_fraction:g})",
    )
    shared.add_argument("--naive-least", type=int, default=least, help=f"values timed at least ({least})")
    shared.add_argument("--memory", help="memory for a pass, such as 2GiB (half of what is free)")
    shared.add_argument("--data", type=Path, default=DATA, help="folder of counterfact_prompts.json, gpt2-tokenizer/")
    add_output(shared, "a tiny model, to try the script")
    return shared


def add_output(to: argparse.ArgumentParser, toy: str) -> None:
    """The options of every script: where results go, and the one to try it, with its help."""
    to.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON (bench/results)")
    to.add_argument("--record", action="store_true", help="put the table into bench/RESULTS.md")
    to.add_argument("--toy", action="store_true", help=toy)


def add_names(to: argparse.ArgumentParser, option: str, names: Iterable[str]) -> None:
    """An option that takes some of the names, separated by commas, and is all of them if it is not given."""
    of = tuple(names)
    listed = f"comma-separated, of {','.join(of)} (all)"
    to.add_argument(option, type=partial(chosen, of=of), default=list(of), help=listed)


def parse(shared: argparse.ArgumentParser) -> argparse.Namespace:
    options = shared.parse_args()
    if not 0 < options.naive_fraction <= 1:
        shared.error(f"--naive-fraction is {options.naive_fraction}; give a number above 0 and up to 1")
    if min(options.prompts, options.samples, options.threads, options.naive_least) < 1:
        shared.error("--prompts, --samples, --threads and --naive-least are whole numbers from 1 up")
    return options


def chosen(names: str, of: tuple[str, ...]) -> list[str]:
    """The names of a comma-separated list, each once, in their own order; an error names one that is not there."""
    wanted = names.split(",")
    for name in wanted:
        if name not in of:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(of)}")
    return [name for name in of if name in wanted]


def limits(options: argparse.Namespace) -> Limits:
    return {"fraction": options.naive_fraction, "least": options.naive_least}


def row_counts(options: argparse.Namespace) -> tuple[int, ...]:
    """Of the products whose rate is measured."""
    return (64, 256) if options.toy else (512, 1024, 2048, 4096)


def measure(model: Any, tokenizer: Any, study: Study, options: argparse.Namespace) -> dict[str, Any]:
    """A study once, after its shortest prompt, beside a part of the naive ways."""
    result, _ = measure_both(
        model,
        tokenizer,
        study,
        limits(options),
        row_counts=row_counts(options),
        warm_up=study.small(),
        memory=options.memory,
    )
    return result


def publish(report: dict[str, Any], text: str, name: str, options: argparse.Namespace) -> None:
    """Print a report, write its JSON and, where that is asked for, its section of the page."""
    print(text)
    say(f"written to {write_json(report, options.out, name + '-toy' * options.toy)}")
    if options.record:
        record(text, name)


def run_each(measurements: Mapping[str, Callable[[], dict[str, Any]]], growing: Growing) -> None:
    """Measure one after the other and write after each. What fails is left out by name, and the exit code tells."""
    failed = []
    for number, (name, measure) in enumerate(measurements.items(), start=1):
        say(f"{name} ({number} of {len(measurements)})")
        try:
            result = {"name": name, **measure()}
        except Exception as error:
            traceback.print_exc()
            failed.append(name)
            result = {"name": name, "skipped": f"{type(error).__name__}: {error}".partition("\n")[0]}
        path = growing.add(result)
        gc.collect()
    print(growing.text)
    say(f"written to {path}")
    for result in growing.report["results"]:
        if result.get("goal") and result["ratio_to_published_same_dtype"] < result["goal"]:
            ratio = result["ratio_to_published_same_dtype"]
            say(f"below its goal: {result['name']}, {ratio:.1f}x of {result['goal']:g}x")
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")
