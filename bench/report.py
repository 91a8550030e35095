"""Writes results: JSON with the machine and the versions, a Markdown table, and its section in RESULTS.md."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import version
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
            **{name: version(name) for name in packages},
            "commit": _commit(),
            "cuda": torch.version.cuda if device.type == "cuda" else None,
        },
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


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
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_json(report: dict[str, Any], folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{report['date']}.json"
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return path


def markdown(report: dict[str, Any]) -> str:
    """The results as a table, with what every ratio means below it."""
    machine, versions = report["machine"], report["versions"]
    prompts = report["prompts"]
    states = ", ".join(f"{kind}:{window}" for kind, window in report["states"])
    results = [result for result in report["results"] if "skipped" not in result]
    lines = [
        f"### {report['title']}",
        "",
        f"{report['date']}, {_where(machine)}; torch {versions['torch']}, transformers {versions['transformers']}, "
        f"causalcone {versions['commit'] or versions['causalcone']}. Prompts: {prompts['source']}, "
        f"mean {prompts['mean_tokens']:.1f} tokens, subject {prompts['mean_subject_tokens']:.1f}. "
        f"States {states}, all prompt tokens, {report['samples']} samples; random weights.",
        "",
        "| model | way | facts | seconds | facts/s | efficiency | peak memory | against naive float32 "
        "| against naive, same dtype |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        naive = result["naive"]
        ratios = [result.get("ratio_to_naive_float32"), result.get("ratio_to_naive_same_dtype")]
        lines.append(_row(result, result, "engine", [_times(ratio) for ratio in ratios]))
        if naive:
            lines.append(_row(result, naive, "naive, scaled" if naive["scaled"] else "naive", ["", ""]))
    lines += [
        "",
        "| model | matmul rate | FLOPs, naive / engine | naive timed on | engine to naive way | bfloat16 to float32 "
        "| effects |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *[_details(result) for result in results],
        "",
        f"Naive: {report['naive']}. Efficiency: {report['efficiency']}. Differences: the largest, in probability and "
        "relative to it. Effects: the largest relative change of a corrupted probability by restoring.",
    ]
    for result in report["results"]:
        if "skipped" in result:
            lines.append(f"Not measured: {result['model']} in {result['dtype']}: {result['skipped']}.")
    return "\n".join([*lines, ""])


def _where(machine: dict[str, Any]) -> str:
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
        f"{way['efficiency']:.0%}",
        f"{way['peak_bytes'] / 2**20:,.0f} MiB",
        *ratios,
    ]
    return f"| {' | '.join(cells)} |"


def _times(ratio: float | None) -> str:
    return f"{ratio:.1f}x" if ratio else ""


def _details(result: dict[str, Any]) -> str:
    naive = result["naive"]
    cells = [
        f"{result['model']}, {result['dtype']}",
        f"{result['matmul']['flops_per_second'] / 1e12:.3g} TFLOP/s",
        f"{result['flops_ratio']:.2f}",
        f"{naive['restorations_timed']:,} of {naive['restorations']:,}" if naive else "",
        _differences(naive and naive["engine_difference"]),
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
