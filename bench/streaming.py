"""Times causal tracing with streamed weights beside resident ones, on the CPU: ``python bench/streaming.py``.

A model of many layers and a small vocabulary, several times larger than the memory that passes may take, saved to a
temporary folder and opened both ways in turn. Prompts are generated ones of the lengths of CounterFact's first 20.
Of the speed what is on disk and what the system holds of it is a part: the files have just been written here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import command
import pyarrow as pa
import torch
import transformers
from measure import PeakMemory, deviation, matmul_rate, planned, say
from report import environment, where
from studies import Tracing
from workload import describe_prompts, generated, gpt2, random_model

from causalcone import Tracer
from causalcone.engine.run.loading import Weights

SHAPES = {
    False: {"n_layer": 40, "n_embd": 512, "n_head": 8, "n_positions": 64, "vocab_size": 1024},
    True: {"n_layer": 6, "n_embd": 64, "n_head": 2, "n_positions": 64, "vocab_size": 1024},
}
"""Built as GPT-2, by whether it is the toy one."""
STATES = (("hidden", 1),)
GOAL = 0.7


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    cpu, shape = torch.device("cpu"), SHAPES[options.toy]
    facts, tokenizer = generated(options.prompts, shape["vocab_size"])

    with TemporaryDirectory() as place:
        model = random_model(gpt2(shape), torch.float32, cpu)
        size = sum(parameter.nbytes for parameter in model.parameters())
        memory = size // options.times if not options.toy else 2**24
        folder = save(model, tokenizer, Path(place) / "model")
        study = Tracing(facts, Tracer(model, tokenizer).noise_level(facts), STATES, options.samples)
        del model
        say(f"{size / 2**20:,.0f} MiB of weights, {memory / 2**20:,.0f} MiB for passes")
        ways = {
            weights: Way(weights, study, lambda w=weights: opened(folder, w, memory)) for weights in get_args(Weights)
        }
        for way in ways.values():
            way.study.small().compute(way.open())
        for _ in range(options.repeats):
            for way in ways.values():
                way.measure()
        results = [way.result() for way in ways.values()]
        tracer = opened(folder, "stream", memory)
        rates = {
            "read_bytes_per_second": tracer.session.architecture.read_rate(),
            "matmul": matmul_rate(tracer.session.sizes, tracer.dtype, cpu, command.row_counts(options)),
        }

    resident, streamed = (way.values for way in ways.values())
    report = {
        "title": f"Streamed weights, {shape['n_layer']} layers of width {shape['n_embd']}",
        **environment(cpu),
        "shape": shape,
        "prompts": describe_prompts(facts, tokenizer, f"{len(facts)} generated with the lengths of CounterFact's"),
        "states": STATES,
        "samples": options.samples,
        "weight_bytes": size,
        "memory_bytes": memory,
        **rates,
        "goal": GOAL,
        "speed": results[0]["seconds"] / results[1]["seconds"],
        "difference": deviation(streamed, resident),
        "results": results,
    }
    command.publish(report, written(report), "streaming", options)


class Way:
    """One place for the weights: each timed run opens the model anew, and plans and checks it for itself."""

    def __init__(self, name: str, study: Tracing, open_model: Callable[[], Tracer]) -> None:
        self.name, self.study, self.open = name, study, open_model
        self.seconds: list[float] = []
        self.opening: list[float] = []
        self.peak = 0

    def measure(self) -> None:
        with (peak := PeakMemory(torch.device("cpu"))):
            began = time.perf_counter()
            tracer = self.open()
            opened = time.perf_counter()
            table: pa.Table = self.study.compute(tracer)
            self.seconds.append(time.perf_counter() - opened)
            self.opening.append(opened - began)
        self.peak = max(self.peak, peak.growth)
        self.values, self.plan = self.study.values(table), self.study.plan(tracer)
        say(f"  {self.name}: {self.seconds[-1]:.1f} s, {peak.growth / 2**20:,.0f} MiB")

    def result(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "seconds": statistics.median(self.seconds),
            "seconds_of_repeats": self.seconds,
            "opening_seconds": statistics.median(self.opening),
            "peak_bytes": self.peak,
            "read_bytes": self.plan.read_bytes,
            **planned(self.plan),
        }


def opened(folder: Path, weights: str, memory: int) -> Tracer:
    return Tracer.from_pretrained(str(folder), weights=weights, memory=memory)


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written(report: dict[str, Any]) -> str:
    """The report as text for the page of results."""
    prompts, versions = report["prompts"], report["versions"]
    states = ", ".join(f"{kind}:{window}" for kind, window in report["states"])
    lines = [
        f"### {report['title']}",
        "",
        f"{report['date']}, {where(report['machine'])}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, causalcone {versions['commit'] or versions['causalcone']}. Prompts: "
        f"{prompts['source']}, mean {prompts['mean_tokens']:.1f} tokens. States {states}, all prompt tokens, "
        f"{report['samples']} samples; random weights of {_mib(report['weight_bytes'])}, of which a pass may take "
        f"{_mib(report['memory_bytes'])}.",
        "",
        "| weights | seconds | opening | passes | read in each | peak memory, the model's included |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for result in report["results"]:
        cells = [
            result["name"], f"{result['seconds']:.2f}", f"{result['opening_seconds']:.2f}", f"{result['passes']:,}",
            _mib(result["read_bytes"]), _mib(result["peak_bytes"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    difference = report["difference"]
    lines += [
        "",
        f"Streamed at {report['speed']:.2f} of the speed of resident weights (goal {report['goal']:g}), the comparison "
        f"with the model's own forward included; a layer is read at {_mib(report['read_bytes_per_second'])}/s, "
        f"products take {report['matmul']['flops_per_second'] / 1e9:,.0f} GFLOP/s. Largest difference of "
        f"{difference['restorations']:,} probabilities: {difference['largest']:.1e}.",
        "",
    ]
    return "\n".join(lines)


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=3, help="how many prompts (3)")
    parser.add_argument("--samples", type=int, default=10, help="noise samples (10)")
    parser.add_argument("--threads", type=int, default=2, help="threads (2)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each way, of which the median counts (2)")
    parser.add_argument("--times", type=int, default=3, help="how many times larger than its memory the model is (3)")
    command.add_output(parser, "a tiny model, to try the script")
    options = parser.parse_args()
    if min(options.prompts, options.samples, options.threads, options.repeats, options.times) < 1:
        parser.error("--prompts, --samples, --threads, --repeats and --times are whole numbers from 1 up")
    return options


if __name__ == "__main__":
    main()
