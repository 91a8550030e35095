"""Predicts what tracing and editing take on GPUs that are not there: ``python bench/simulate_gpu.py``.

Counted are the engine's own operations, at the sizes of the models, on a pretended device that has shapes and no values
(``gpu_operations.py``); seconds are those of the rates in its table of assumptions. Nothing is measured but the host's
plans and index arrays. Causal tracing, ROME, MEMIT, fine-tuning and scoring, in bfloat16, in the shapes of GPT2-XL,
GPT-J-6B and Llama-3-8B; what ``bench/gpu.py`` measured of them stands beside.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import command
import torch
from editing_flops import Flops
from editing_methods import METHODS, Setup
from editing_workload import NOWHERE, editing_workload
from gpu_operations import A100, ASSUMED, H100, H200, Device, Operation, Times, recording, times
from large_models import MODELS, config_of, shape_of
from measure import say
from report import environment, record, write_json
from studies import Tracing
from workload import LENGTHS, generated, random_model

from causalcone import Tracer
from causalcone.engine.models import read_architecture

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
DEVICES = (H100, A100, H200)
STEPS = 1
"""Steps of a search that are recorded, and one more: what that one takes more is what each of the others takes."""
EARLIER = {"GPT2-XL": (0.51, 0.16, 0.15), "GPT-J-6B": (0.27, 0.62, 0.51), "Llama-3-8B": (0.39, 0.66, 0.47)}
"""Seconds a fact, efficiency, and that of the first facts, predicted for an H100 at the same rates from the operations
that were counted before plans were kept, index arrays made on the host, and attention launched for many facts."""
WINDOWS = 1.0e17
"""FLOPs of tracing 652 facts in GPT-J with windows 1, 3, 5 and 10: ``causalcone sweep hase2023-gptj --plan``, with the
lengths of 60 CounterFact prompts."""
PARTS = ("products", "rows", "attention", "uploads", "readout")
SHOWN, KEPT = 12, 20
"""Operations of a work, but products, that are printed; and operations that are written."""


@dataclass
class Work:
    """Something that is done: ``count`` facts or edits, in ``flops`` of products with weights by the engine's formula.
    operations: what the device is asked for, with as few ``steps`` as were recorded; longer: with one more; planning:
    seconds of the host; rows: those that the plan has."""

    model: str
    name: str
    count: int
    flops: int
    operations: Sequence[Operation]
    longer: Sequence[Operation] = ()
    steps: int = 0
    planning: float = 0.0
    rows: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    def times(self, device: Device) -> Times:
        """But for the factors of second moments, which later edits of the same layers find made. Of a pass among
        others: the device is at work on it while the host prepares the next."""
        few = self.first(device)
        if self.longer:
            return few.onward(_without_factors(self.longer, device), self.steps - STEPS)
        return replace(few, total=times([*self.operations, *self.operations], device).total - few.total)

    def first(self, device: Device) -> Times:
        """Of what was recorded."""
        return _without_factors(self.operations, device)

    def factors(self, device: Device) -> float:
        """Seconds for the factors."""
        return times((each for each in self.operations if each.part == "factors"), device).total

    def result(self, device: Device) -> dict[str, Any]:
        found = self.times(device)
        ideal = self.flops / device.products(2)
        return {
            **{"model": self.model, "work": self.name, "device": device.name, "count": self.count, **self.about},
            **{"flops": self.flops, "seconds": found.total, "seconds_each": found.total / self.count},
            "efficiency": ideal / found.total,
            "efficiency_of_first": ideal / (self.first(device).total + self.planning),
            "planning_seconds": self.planning,
            "factor_seconds": self.factors(device),
            "host_seconds": found.host,
            "device_seconds": found.device,
            "parts": found.parts,
            "bound_by": found.bound_by,
        }

    def by_function(self, device: Device) -> list[dict[str, Any]]:
        """What the device is asked for, by operation and functions, the slowest first: in one more step, where there
        are steps, or in all."""
        often = Counter(self.longer)
        often.subtract(self.operations)
        found: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0, 0.0])
        for each, calls in (+often or Counter(self.operations)).items():
            sums = found[each.part, each.name, each.asked]
            sums[:] = sums[0] + calls, sums[1] + calls * each.moved, sums[2] + calls * each.seconds(device)
        whole = sum(seconds for *_, seconds in found.values())
        return [
            {
                **{"part": part, "operation": name, "asked_by": asked, "calls": calls, "bytes": size},
                **{"seconds": seconds, "share": seconds / whole},
            }
            for (part, name, asked), (calls, size, seconds) in sorted(found.items(), key=lambda item: -item[1][2])
            if seconds
        ]


def _without_factors(operations: Sequence[Operation], device: Device) -> Times:
    return times((each for each in operations if each.part != "factors"), device)


def model_on(name: str, toy: bool) -> tuple[Any, int]:
    """A model on the pretended device, and half of the bytes that it leaves there; an A100 and an H100 have as many."""
    model = random_model(config_of(name, toy), torch.bfloat16, torch.device("cuda"))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return model, int((H100.memory * 2**30 - 1.5 * 2**30 - weights) / 2)


def tracing(name: str, options: argparse.Namespace) -> Work:
    """Causal tracing of facts with the lengths of the benchmarks', which are one pass."""
    facts, tokenizer = generated(options.facts, shape_of(name, options.toy)["vocab_size"])
    with recording() as recorded:
        model, memory = model_on(name, options.toy)
        tracer = Tracer(model, tokenizer, memory=memory)
        study = Tracing(facts, sigma=0.1, samples=options.samples)
        plan = study.plan(tracer)
        tracer, recorded.planning = Tracer(model, tokenizer, memory=memory), 0.0
        recorded.operations.clear()
        study.compute(tracer)
    about = {"passes": plan.passes, "layers": model.config.num_hidden_layers}
    work = Work(name, "tracing", len(facts), plan.flops, recorded.operations, rows=plan.rows, about=about)
    work.planning = recorded.planning
    return work


def editing(name: str, options: argparse.Namespace) -> Iterator[Work]:
    depth = config_of(name, options.toy).num_hidden_layers
    middle, some = [depth * 3 // 7], sorted({depth * place // 7 for place in (1, 3, 5)})
    many = options.edit_facts
    for title, method, facts, layers in (
        ("ROME, 1 edit", "rome", 1, middle),
        (f"ROME, {many} facts x {len(some)} layers", "rome", many, some),
        ("ROME, 1 fact x all layers", "rome", 1, list(range(depth))),
        (f"MEMIT, window 5, {many} facts", "memit", many, middle),
        (f"FT-1, {many} facts x {len(some)} layers", "finetune", many, some),
        (f"scoring, {many} facts x {len(some)} layers", "scoring", many, some),
    ):
        say(f"{name}: {title}")
        yield edits(name, title, method, facts, layers, options)


def edits(name: str, title: str, method: str, facts: int, layers: list[int], options: argparse.Namespace) -> Work:
    shape = shape_of(name, options.toy)
    work = editing_workload(NOWHERE, facts, shape["vocab_size"])
    chosen = METHODS["rome" if method == "scoring" else method]
    steps, recorded = chosen.hparams.steps, []
    for few in (STEPS, STEPS + 1):
        with recording() as heard:
            model, memory = model_on(name, options.toy)
            sizes = read_architecture(model).sizes
            moments = {layer: torch.empty(sizes.inner, sizes.inner, device="cuda") for layer in range(sizes.depth)}
            setup = Setup(model, work.tokenizer, work.facts, layers, work.contexts, moments, memory)
            brief = replace(chosen, hparams=replace(chosen.hparams, steps=few))
            editor = setup.editor()
            requests = setup.requests(editor)
            heard.operations.clear()
            made = [edit for batch in brief.batches(editor, requests, layers) for edit in batch]
            if method == "scoring":
                heard.operations.clear()
                editor.score(made)
        recorded.append(heard.operations)
        if method == "scoring":
            return Work(name, title, len(made), Flops(setup.encoder).scoring(made), *recorded, steps=STEPS)
    return Work(name, title, len(made), chosen.flops(setup, made), *recorded, steps=steps)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    works: list[Work] = []
    for name in options.models:
        say(f"{name}: tracing")
        works.append(tracing(name, options))
        if "editing" in options.parts:
            works += editing(name, options)
    report = {
        "title": f"What GPUs would take, predicted{', toy' * options.toy}",
        **environment(torch.device("cpu")),
        "predicted": True,
        "assumed": [*map(list, ASSUMED), *([device.name, published(device)] for device in DEVICES)],
        "facts": options.facts,
        "samples": options.samples,
        "states": Tracing.states,
        "results": [{**work.result(device), **counted(work)} for work in works for device in DEVICES],
        "operations": {
            f"{work.model}, {work.name}{', a step' if work.longer else ''}": work.by_function(H100)[:KEPT]
            for work in works
        },
        "measured": measured(options.out),
    }
    text = markdown(report)
    print(text)
    for title, rows in report["operations"].items():
        print(operations_table(title, rows))
    say(f"written to {write_json(report, options.out, 'gpu-predicted' + '-toy' * options.toy)}")
    if options.record:
        record(text, "gpu predicted", PAGE)


def counted(work: Work) -> dict[str, int]:
    """FLOPs of the products with weights that were asked for, and the rows that layers put out: the formula's."""
    few, many = (
        sum(each.flops for each in operations) for operations in (work.operations, work.longer or work.operations)
    )
    return {"counted_flops": few + (work.steps - STEPS) * (many - few), "rows": work.rows}


def published(device: Device) -> str:
    return (
        f"{device.peak / 1e12:.0f} TFLOP/s, {device.bandwidth / 1e12:.2f} TB/s, {device.sms} SMs; taken as "
        f"{device.products(2) / 1e12:.0f} TFLOP/s ({device.source})"
    )


def measured(folder: Path) -> list[dict[str, Any]]:
    """What ``bench/gpu.py`` measured: seconds of a fact or an edit in bfloat16, by model and device."""
    found = []
    for path in sorted(folder.glob("gpu-*.json")):
        report = json.loads(path.read_text())
        if report.get("predicted") or "toy" in report["title"]:
            continue
        for result in report["results"]:
            seconds = result.get("seconds_per_fact")
            if seconds and result.get("dtype") == "bfloat16":
                each = {"model": result["model"], "device": report["machine"]["device"], "seconds_each": seconds}
                found.append({**each, "efficiency": result["efficiency"], "date": report["date"]})
    return found


def markdown(report: dict[str, Any]) -> str:
    traced = [result for result in report["results"] if result["work"] == "tracing"]
    edited = [result for result in report["results"] if result["work"] != "tracing"]
    versions = report["versions"]
    lines = [
        f"Predicted, not measured: {report['date']}, causalcone {versions['commit'] or versions['causalcone']}, "
        "`python bench/simulate_gpu.py`. Counted are the engine's own operations at the models' sizes, in bfloat16, on "
        "a pretended device; assumed is what each takes:",
        "",
        "| | assumed |",
        "|---|---|",
        *(f"| {what} | {how} |" for what, how in report["assumed"]),
        "",
        f"Tracing {report['facts']} facts in one pass, hidden:1 mlp:10 attn:10, all tokens, {report['samples']} "
        "samples. Efficiency: FLOPs of all projections and the unembedding over (seconds x assumed rate of products); "
        "of the first facts with their plans, else with plans that are kept. Device and host work beside each other.",
        "",
        "| model | device | s a fact | efficiency | first facts | products s | rows s | attention s | uploads s "
        "| readout s | host s | plans s | bound by | measured s a fact |",
        f"|---|---|{'--:|' * 10}---|--:|",
        *(_traced(result, report["measured"]) for result in traced),
        *(
            f"| {name}, as counted earlier | H100 | {seconds:.2f} | {steady:.2f} | {first:.2f} |{' |' * 9}"
            for name, (seconds, steady, first) in EARLIER.items()
            if name in {result["model"] for result in traced}
        ),
    ]
    for result in traced:
        if (result["model"], result["device"]) == ("GPT-J-6B", "H100"):
            minutes = WINDOWS / result["flops"] * result["seconds"] / 60
            lines += [
                "",
                "Tracing 652 facts in GPT-J with windows 1, 3, 5 and 10, as Hase et al. did in about two days on an "
                f"A6000, takes {WINDOWS / 1e17:.1f}e17 FLOPs: {minutes:.0f} minutes of an H100 at that efficiency.",
            ]
    if edited:
        lines += [
            "",
            "Editing, every method with all of its steps. Factors of second moments are made once for a layer and are "
            "apart.",
            "",
            "| model | work | edits | s an edit, H100 | efficiency | products s | rows s | attention s | readout s "
            "| host s | bound by | factors s | s an edit, A100 | s an edit, H200 |",
            f"|---|---|{'--:|' * 8}---|--:|--:|--:|",
            *(_edited(*edited[start : start + len(DEVICES)]) for start in range(0, len(edited), len(DEVICES))),
        ]
    return "\n".join([*lines, ""])


def _traced(result: dict[str, Any], measurements: list[dict[str, Any]]) -> str:
    there = [
        f"{each['seconds_each']:.3f} ({each['date']})"
        for each in measurements
        if each["model"] == result["model"] and result["device"] in each["device"]
    ]
    cells = [
        *(result["model"], result["device"], f"{result['seconds_each']:.3f}", f"{result['efficiency']:.2f}"),
        f"{result['efficiency_of_first']:.2f}",
        *(f"{result['parts'].get(part, 0):.2f}" for part in PARTS),
        *(f"{result['host_seconds']:.2f}", f"{result['planning_seconds']:.2f}", result["bound_by"]),
        there[-1] if there else "",
    ]
    return f"| {' | '.join(cells)} |"


def _edited(result: dict[str, Any], *others: dict[str, Any]) -> str:
    parts = (f"{result['parts'].get(part, 0):.2f}" for part in PARTS if part != "uploads")
    cells = [
        *(result["model"], result["work"], str(result["count"]), f"{result['seconds_each']:.3f}"),
        *(f"{result['efficiency']:.2f}", *parts, f"{result['host_seconds']:.2f}", result["bound_by"]),
        f"{result['factor_seconds']:.1f}",
        *(f"{other['seconds_each']:.3f}" for other in others),
    ]
    return f"| {' | '.join(cells)} |"


def operations_table(title: str, rows: list[dict[str, Any]]) -> str:
    """What costs most on an H100, apart from products and factors."""
    shown = [row for row in rows if row["part"] not in ("products", "factors")][:SHOWN]
    return "\n".join(
        [
            f"### {title}: what costs most but products, H100",
            "",
            "| operation | asked by | calls | GB | ms | of the device's time |",
            "|---|---|--:|--:|--:|--:|",
            *(
                f"| {row['operation']} | {row['asked_by']} | {row['calls']:,} | {row['bytes'] / 1e9:.2f} "
                f"| {row['seconds'] * 1e3:.1f} | {row['share']:.1%} |"
                for row in shown
            ),
            "",
        ]
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--parts", nargs="+", choices=["tracing", "editing"], default=["tracing", "editing"])
    parser.add_argument("--facts", type=int, default=len(LENGTHS), help="facts that are traced (20)")
    parser.add_argument("--samples", type=int, default=10, help="noise samples (10)")
    parser.add_argument("--edit-facts", type=int, default=10, help="facts that are edited at each layer (10)")
    command.add_output(parser, "tiny models, to try the script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
