"""Writes results: JSON with the machine and the versions, a Markdown table, and its section in RESULTS.md."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE / "RESULTS.md"
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")


def environment(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the date that go with every result."""
    packages = ("torch", "transformers", "numpy", "causalcone")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {"device": device_name(device), **_cpu(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
            "commit": _commit(),
            "cuda": torch.version.cuda if device.type == "cuda" else None,
        },
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # causalcone beside bench/ is imported without being installed
        return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _cpu() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in flags],
    }


def _commit() -> str | None:
    """The commit, and where the code is not exactly that, which change it has. The page of results may differ."""
    page = PAGE.relative_to(HERE.parent)
    try:
        name = _git("describe", "--always", "--exclude=*").decode().strip()
        change = _git("diff", "HEAD", "--", ":/", f":(top,exclude){page}")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{name}-dirty-{hashlib.sha1(change).hexdigest()[:7]}" if change else name


def _git(*command: str) -> bytes:
    return subprocess.run(["git", *command], cwd=HERE, capture_output=True, check=True).stdout


def write_json(report: dict[str, Any], folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(report, name)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return path


def file_name(report: dict[str, Any], name: str) -> str:
    return f"{name}-{report['date']}.json"


def measured(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [result for result in report["results"] if "skipped" not in result]


def not_measured(report: dict[str, Any]) -> list[str]:
    """A sentence for each result that is not there, with the reason."""
    skipped = [result for result in report["results"] if "skipped" in result]
    return [f"Not measured: {_title(result)}: {result['skipped']}." for result in skipped]


def _title(result: dict[str, Any]) -> str:
    if "model" not in result:
        return result["name"]
    return f"{result['model']} in {result['dtype']}" if "dtype" in result else result["model"]


def markdown(report: dict[str, Any]) -> str:
    """The results as a table, with what every ratio means below it."""
    lines = [
        *_introduction(report),
        "| model | way | facts | seconds | facts/s | efficiency | peak memory | against naive, float32 "
        "| against naive, same dtype | against published, float32 | against published, same dtype |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in measured(report):
        ratios = [f"ratio_to_{way}_{dtype}" for way in ("naive", "published") for dtype in ("float32", "same_dtype")]
        lines.append(_row(result, result, "engine", [_times(result.get(ratio)) for ratio in ratios]))
        for way, name in (("naive", "naive, batched"), ("published", "as published")):
            scaled = ", scaled" * result[way]["scaled"]
            lines.append(_row(result, result[way], f"{name}{scaled}", [""] * len(ratios)))
    lines += [
        "",
        "| model | matmul rate | FLOPs, naive / engine | FLOPs, published / engine | sequences, naive / published "
        "| naive / published timed on | engine to naive way | bfloat16 to float32 | effects |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        *[_details(result) for result in measured(report)],
        "",
        _meanings(report),
    ]
    return "\n".join([*lines, *not_measured(report), ""])


def comparison(report: dict[str, Any]) -> str:
    """A table with one line per thing compared, such as a method, and a second one with what there is to know of it."""
    kind = report["compared"]
    lines = [
        *_introduction(report),
        f"| {kind} | facts | seconds | facts/s | efficiency | peak memory | naive, scaled | against naive "
        "| published, scaled | against published | goal | engine to naive way | effects |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        *[_compared(result) for result in measured(report)],
        "",
        f"| {kind} | {report['detail']} | sequences, naive / published | naive / published timed on "
        "| naive efficiency | published efficiency |",
        "|---|---|--:|--:|--:|--:|",
        *[_compared_details(result) for result in measured(report)],
        "",
        f"{_meanings(report)} Goals are against the published way. {report['note']}.",
    ]
    return "\n".join([*lines, *not_measured(report), ""])


def editing(report: dict[str, Any]) -> str:
    """A table with one line per method of editing, and a second one with what there is to know of it."""
    lines = [
        *_heading(report, report["given"]),
        "| method | edits | seconds | edits/s | efficiency | peak memory | naive, scaled | against naive "
        "| change of weights | p after the edit | effects |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        *[_edited(result) for result in measured(report)],
        "",
        "| method | layers | naive way | naive timed on | naive peak memory | matmul rate |",
        "|---|---|---|--:|--:|--:|",
        *[_edited_details(result) for result in measured(report)],
        "",
        f"Naive: {report['naive']}. Efficiency: {report['efficiency']}. Change of weights: the largest norm of the "
        "difference of engine and naive way, relative to the naive way's. P after the edit: their largest difference "
        "over all prompts and both targets, in probability and relative to it. Effects: the largest relative change of "
        f"the new target's probability by an edit. {report['note']}.",
    ]
    return "\n".join([*lines, *not_measured(report), ""])


def _edited(result: dict[str, Any]) -> str:
    naive = result["naive"]
    difference = naive["engine_difference"]
    weights = difference["largest_of_weights"]
    cells = [
        result["name"],
        f"{result['edits']:,}",
        *_speed(result, "edits_per_second"),
        "" if weights is None else f"{weights:.1e}",
        _differences(difference),
        f"{result['largest_relative_effect']:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def _edited_details(result: dict[str, Any]) -> str:
    naive = result["naive"]
    cells = [
        result["name"],
        ", ".join(map(str, result["layers"])),
        result["detail"],
        f"{naive['edits_timed']:,} of {naive['edits']:,}",
        f"{naive['peak_bytes'] / 2**20:,.0f} MiB",
        f"{result['matmul']['flops_per_second'] / 1e12:.3g} TFLOP/s",
    ]
    return f"| {' | '.join(cells)} |"


def _introduction(report: dict[str, Any]) -> list[str]:
    states = ", ".join(f"{kind}:{window}" for kind, window in report.get("states", ()))
    given = f"{f'States {states}, all prompt tokens, ' if states else ''}{report['samples']} samples; "
    given += report.get("weights", "random weights")
    return _heading(report, given)


def _heading(report: dict[str, Any], given: str) -> list[str]:
    """The title, where and on which prompts was measured, and what else was ``given``."""
    versions, prompts = report["versions"], report["prompts"]
    return [
        f"### {report['title']}",
        "",
        f"{report['date']}, {where(report['machine'])}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, causalcone {versions['commit'] or versions['causalcone']}. "
        f"Prompts: {prompts['source']}, mean {prompts['mean_tokens']:.1f} tokens, subject "
        f"{prompts['mean_subject_tokens']:.1f}. {given}.",
        "",
    ]


def _meanings(report: dict[str, Any]) -> str:
    return (
        f"Naive: {report['naive']}. Published, with one state a forward: {report['published']}. Sequences: of a "
        f"forward. Efficiency: {report['efficiency']}. Differences: the largest, in probability and relative to it. "
        "Effects: the largest relative change of a probability by the method."
    )


def where(machine: dict[str, Any]) -> str:
    cpu = f"{machine['cpu']}, threads: {machine['threads']}"
    flags = f" ({', '.join(machine['flags'])})" if machine["flags"] else ""
    return f"{cpu}{flags}" if machine["device"] == "cpu" else f"{machine['device']}, {cpu}"


def _row(result: dict[str, Any], way: dict[str, Any], name: str, ratios: list[str]) -> str:
    cells = [
        result["model"],
        f"{name}, {way['dtype']}",
        str(result["facts"]),
        f"{way['seconds']:.2f}",
        f"{way['facts_per_second']:.3g}",
        _share(way["efficiency"]),
        f"{way['peak_bytes'] / 2**20:,.0f} MiB",
        *ratios,
    ]
    return f"| {' | '.join(cells)} |"


def _speed(result: dict[str, Any], rate: str) -> list[str]:
    """Cells on seconds, rate, efficiency, memory, the naive way's seconds and the ratio of the two."""
    return [
        f"{result['seconds']:.2f}",
        f"{result[rate]:.3g}",
        _share(result["efficiency"]),
        f"{result['peak_bytes'] / 2**20:,.0f} MiB",
        f"{result['naive']['seconds']:.1f}",
        _times(result["ratio_to_naive_same_dtype"]),
    ]


def _compared(result: dict[str, Any]) -> str:
    published, effect = result["published"], result["largest_relative_effect"]
    cells = [
        result["name"],
        str(result["facts"]),
        *_speed(result, "facts_per_second"),
        f"{published['seconds']:.1f}",
        _times(result["ratio_to_published_same_dtype"]),
        f"{result['goal']:g}x" if result["goal"] else "",
        _differences(result["naive"]["engine_difference"]),
        "" if effect is None else f"{effect:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def _compared_details(result: dict[str, Any]) -> str:
    shares = [_share(result[way]["efficiency"]) for way in ("naive", "published")]
    return f"| {' | '.join([result['name'], result['detail'], *_both_naive(result), *shares])} |"


def _both_naive(result: dict[str, Any]) -> list[str]:
    """Cells on both naive ways: sequences of a forward, and how many of all values were timed."""
    ways = [result[way] for way in ("naive", "published")]
    timed = " / ".join(f"{way['restorations_timed']:,}" for way in ways)
    return [" / ".join(f"{way['sequences']:,}" for way in ways), f"{timed} of {ways[0]['restorations']:,}"]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _times(ratio: float | None) -> str:
    return f"{ratio:.1f}x" if ratio else ""


def _details(result: dict[str, Any]) -> str:
    cells = [
        f"{result['model']}, {result['dtype']}",
        f"{result['matmul']['flops_per_second'] / 1e12:.3g} TFLOP/s",
        *(f"{result[way]['flops'] / result['flops']:.2f}" for way in ("naive", "published")),
        *_both_naive(result),
        _differences(result["naive"]["engine_difference"]),
        _differences(result.get("deviation_from_float32")),
        f"{result['largest_relative_effect']:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def _differences(found: dict[str, Any] | None) -> str:
    return f"{found['largest']:.1e}, {found['largest_relative']:.1e}" if found else ""


def record(text: str, name: str, page: Path = PAGE) -> None:
    """Put the text into the page between the markers of ``name``, or at its end."""
    first, last = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{first}\n{text.strip()}\n{last}\n"
    whole = page.read_text()
    if first in whole:
        before, _, rest = whole.partition(first)
        whole = before + section + rest.partition(f"{last}\n")[2]
    else:
        whole = f"{whole.rstrip()}\n\n{section}"
    page.write_text(whole)


class Growing:
    """A report whose results come one by one: JSON and page are written anew after each.

    A file of the same day is continued if everything but its results is the same, so that a run of a part replaces
    what it measured again and keeps the rest; another file is left as it is.
    """

    def __init__(
        self,
        report: dict[str, Any],
        order: Sequence[str],
        folder: Path,
        name: str,
        section: str | None,
        written: Callable[[dict[str, Any]], str] = comparison,
    ) -> None:
        """order: of the results, by their ``name``; section: of the page, if it is to be written; written: the report
        as text."""
        self.report, self.order, self.folder, self.section = {**report, "results": []}, order, folder, section
        self.written = written
        self.name = next(each for each in _numbered(name) if self._continues(folder / file_name(report, each)))

    def _continues(self, path: Path) -> bool:
        """Whether the results belong into the file; takes over those that are there."""
        if not path.exists():
            return True
        earlier = json.loads(path.read_text())
        results = earlier.pop("results")
        own = {key: value for key, value in self.report.items() if key != "results"}
        if earlier != json.loads(json.dumps(own)):
            return False
        self.report["results"] = results
        return True

    def add(self, result: dict[str, Any]) -> Path:
        others = [each for each in self.report["results"] if each["name"] != result["name"]]
        self.report["results"] = sorted([*others, result], key=lambda each: self.order.index(each["name"]))
        if self.section:
            record(self.text, self.section)
        return write_json(self.report, self.folder, self.name)

    @property
    def text(self) -> str:
        return self.written(self.report)


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in count(2))
