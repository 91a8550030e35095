"""What is measured of editing: each method the naive way, on a part of its edits, and then by the engine, on all."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import naive
import naive_editing
import naive_scoring
import pyarrow as pa
import pyarrow.compute as pc
import torch
from editing_flops import Flops
from editing_methods import Method, Setup
from measure import PeakMemory, matmul_rate, say, synchronize
from naive_editing import Key, NaiveEdits
from naive_scoring import Probe
from oracles.editing import Change

from causalcone.engine.edit.deltas.delta import Delta, Dense
from causalcone.engine.edit.methods.edits import Edit

NAIVE = (
    "as named, one edit at a time as published code does, with all of its contexts, or all of its prompts, in one "
    "batch; with all layers, tokens and logits of sequences padded to one length; weights that are not trained are "
    "frozen"
)
EFFICIENCY = (
    "FLOPs of all projections and the unembedding as executed, forwards and back / (seconds x matmul rate); the rate "
    "is the best measured in the same run over the model's projection shapes, in the same dtype and on the same device"
)
NOTE = (
    "All methods take all of their steps: no loss ends them early. Seconds are those of making the edits, or of "
    "scoring them; ROME's second moments are inverted beforehand in both ways. Not compared are changes of weights "
    "that only rounding determines: in the last layer, where the prompt goes on behind the subject"
)


@dataclass
class Kept:
    """Changes of weights that the naive way made, in files until the engine's are compared with them: neither way's
    memory counts them."""

    folder: Path
    files: dict[Key, Path] = field(default_factory=dict)

    def __call__(self, key: Key, edit: naive_editing.Edit, seconds: float) -> None:
        say(f"    fact {key[0]}, layer {key[1]}: {seconds:.1f} s{'' if self.files else ', to warm up'}")
        self.files.setdefault(key, self.folder / f"{len(self.files)}.pt")
        torch.save({layer: (each.weight, each.bias) for layer, each in edit.changes.items()}, self.files[key])

    def changes(self, key: Key) -> dict[int, Change]:
        held = torch.load(self.files[key], map_location="cpu")
        return {layer: Change(*parts) for layer, parts in held.items()}


@dataclass
class Difference:
    """The largest differences of the engine's results from the naive way's: of an edit's change of weights, as a norm
    relative to that of the naive way's, and of probabilities after the edit. effect: the largest relative change of the
    probability of a fact's new target by its edit."""

    edits: int = 0
    changes: int = 0
    weights: float | None = None
    p_post: float = 0.0
    p_post_relative: float = 0.0
    effect: float = 0.0

    def add_probes(self, rows: pa.Table, theirs: Sequence[Probe]) -> None:
        """rows: those of one edit in the engine's table."""
        ours = {(row["prompt_kind"], row["prompt_index"]): row for row in rows.to_pylist()}
        assert len(ours) == len(theirs)
        self.edits += 1
        for probe in theirs:
            row = ours[probe.prompt_kind, probe.prompt_index]
            for name in ("p_post", "p_post_other"):
                p = getattr(probe, name)
                gap = abs(row[name] - p)
                self.p_post, self.p_post_relative = max(self.p_post, gap), max(self.p_post_relative, gap / p)
        rewrite = ours["rewrite", 0]
        self.effect = max(self.effect, abs(rewrite["p_post"] / rewrite["p_pre"] - 1))

    def add_weights(self, delta: Delta, theirs: Mapping[int, Change]) -> None:
        self.changes += 1
        self.weights = max(self.weights or 0.0, relative_difference(delta, theirs))

    def result(self) -> dict[str, Any]:
        counts = {"edits": self.edits, "changes_of_weights": self.changes, "largest_of_weights": self.weights}
        return {**counts, "largest": self.p_post, "largest_relative": self.p_post_relative}


def relative_difference(delta: Delta, changes: Mapping[int, Change]) -> float:
    """The norm of the difference of two changes of weights and biases, relative to that of ``changes``."""
    assert delta.changes.keys() == changes.keys()
    apart = size = 0.0
    for layer, theirs in changes.items():
        ours = delta.changes[layer]
        bias = ours.bias if isinstance(ours, Dense) else None
        assert (bias is None) == (theirs.bias is None)
        for own, reference in ((ours.rows(slice(None)), theirs.weight), (bias, theirs.bias)):
            if own is not None and reference is not None:
                size += reference.double().square().sum().item()
                apart += (own.detach().cpu().double() - reference).square().sum().item()
    return (apart / size) ** 0.5


def measure(
    method: Method, setup: Setup, limits: naive.Limits, row_counts: Sequence[int]
) -> tuple[dict[str, Any], list[Edit]]:
    """A result as it goes into the JSON, and the engine's edits; those of ROME with their changes of weights."""
    rates = [_rate(setup, row_counts)]
    with tempfile.TemporaryDirectory() as folder:
        kept = Kept(Path(folder))
        say(f"  naive, {setup.dtype}")
        peak = PeakMemory(setup.device)
        with peak:
            run = method.measure_naive(setup, kept, limits)
        theirs = _naive_result(run.editing_seconds, len(run.timed), run.edits, peak)
        theirs["seconds_timed"] = sum(each.editing_seconds for each in run.timed.values())
        theirs["scoring_seconds"] = run.scoring_seconds

        say(f"  engine, {setup.dtype}: {setup.edits} edits")
        difference = Difference()
        peak = PeakMemory(setup.device)
        with peak:
            seconds, flops, edits = _edit(method, setup, kept, run, difference)
    rates.append(_rate(setup, row_counts))
    about = {"method": method.name, "window": method.window, "hparams": vars(method.hparams)}
    ours = _result(setup, seconds, len(edits), flops, peak, theirs, rates, difference)
    return {**about, "detail": method.naive_way, **ours}, edits


def _edit(
    method: Method, setup: Setup, kept: Kept, run: NaiveEdits, difference: Difference
) -> tuple[float, int, list[Edit]]:
    """Seconds, FLOPs and edits; what the naive way made as well is compared on the way, which is not timed."""
    method.warm_up(setup)
    editor, seconds, flops, edits = setup.editor(), 0.0, 0, []
    requests = setup.requests(editor)
    if method.name == "rome":  # the naive way has its inverses beforehand, too
        for layer in setup.layers:
            editor.moments.solve(layer, torch.zeros(len(setup.moments[layer]), 1, device=setup.device))
    synchronize(setup.device)
    began = time.perf_counter()
    for batch in method.batches(editor, requests, setup.layers):
        synchronize(setup.device)
        seconds += time.perf_counter() - began
        for edit in batch:
            if edit.reason is not None:
                raise RuntimeError(f"the edit {edit.edit_id} failed: {edit.reason}")
            key = edit.fact_id, edit.layer
            if key in run.timed:
                if not method.changes_nothing(setup, edit):
                    difference.add_weights(edit.delta, kept.changes(key))
                difference.add_probes(editor.score([edit]), run.timed[key].probes)
        flops += method.flops(setup, batch)
        edits += batch if method.name == "rome" else [edit.dropped() for edit in batch]
        say(f"    {len(edits)} edits: {seconds:.1f} s")
        del batch, edit
        began = time.perf_counter()
    return seconds, flops, edits


def measure_scoring(
    setup: Setup, edits: Sequence[Edit], limits: naive.Limits, row_counts: Sequence[int]
) -> dict[str, Any]:
    """Scoring the same edits both ways, each on all prompts of its fact."""
    rates = [_rate(setup, row_counts)]
    say(f"  naive, {setup.dtype}")
    peak = PeakMemory(setup.device)
    with peak:
        in_order = sorted(edits, key=lambda edit: setup.layers.index(edit.layer))
        work = [naive.Task([edit.edit_id], partial(_score_naively, setup, edit)) for edit in in_order]
        run = naive.timed(work, **limits)
    scored: Any = run.p_patched  # here whatever the work computes
    spent = sum(seconds for _, seconds in scored.values())
    theirs = _naive_result(spent / len(scored) * len(edits), len(scored), len(edits), peak)
    theirs["seconds_timed"] = spent

    say(f"  engine, {setup.dtype}: {len(edits)} edits")
    peak = PeakMemory(setup.device)
    with peak:
        setup.editor().score(edits[:1])
        editor = setup.editor()
        synchronize(setup.device)
        began = time.perf_counter()
        table = editor.score(edits)
        seconds = time.perf_counter() - began
    say(f"    {seconds:.1f} s")
    difference = Difference()
    for edit_id, (probes, _) in scored.items():
        difference.add_probes(table.filter(pc.field("edit_id") == edit_id), probes)
    rates.append(_rate(setup, row_counts))
    flops = Flops(setup.encoder).scoring(edits)
    about = {"method": "scoring", "window": 1, "prompts": len(table), "detail": naive_scoring.SCORING}
    return {**about, **_result(setup, seconds, len(edits), flops, peak, theirs, rates, difference)}


def _score_naively(setup: Setup, edit: Edit) -> list[tuple[list[Probe], float]]:
    """The probes of one edit, and the seconds that they took."""
    changes = {layer: Change(change.rows(slice(None))) for layer, change in edit.delta.changes.items()}
    began = time.perf_counter()
    probes = naive_scoring.score(setup.model, setup.tokenizer, edit.request.fact, changes)
    seconds = time.perf_counter() - began
    say(f"    fact {edit.fact_id}, layer {edit.layer}: {seconds:.1f} s")
    return [(probes, seconds)]


def _naive_result(seconds: float, timed: int, edits: int, peak: PeakMemory) -> dict[str, Any]:
    say(f"    {seconds:.1f} s for all, from {timed} of {edits} edits")
    counts = {"edits": edits, "edits_timed": timed, "scaled": timed < edits}
    return {**counts, "seconds": seconds, "edits_per_second": edits / seconds, "peak_bytes": peak.growth}


def _result(
    setup: Setup,
    seconds: float,
    edits: int,
    flops: int,
    peak: PeakMemory,
    theirs: dict[str, Any],
    rates: Sequence[dict[str, Any]],
    difference: Difference,
) -> dict[str, Any]:
    best = max(rates, key=lambda rate: rate["flops_per_second"])
    return {
        "dtype": setup.dtype,
        "facts": len(setup.facts),
        "layers": list(setup.layers),
        "edits": edits,
        "seconds": seconds,
        "edits_per_second": edits / seconds,
        "flops": flops,
        "matmul": best,
        "efficiency": flops / (seconds * best["flops_per_second"]),
        "peak_bytes": peak.growth,
        "weight_bytes": sum(parameter.nbytes for parameter in setup.model.parameters()),
        "largest_relative_effect": difference.effect,
        "ratio_to_naive_same_dtype": theirs["seconds"] / seconds,
        "naive": {"dtype": setup.dtype, **theirs, "engine_difference": difference.result()},
    }


def _rate(setup: Setup, row_counts: Sequence[int]) -> dict[str, Any]:
    return matmul_rate(setup.encoder.sizes, setup.model.dtype, setup.device, row_counts)
