"""What is measured in the course of a sequence of edits: scores of edits new and old, and the model's health."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.scoring.evaluate import Scores
from causalcone.engine.edit.sequences.held_out import HeldOut
from causalcone.engine.edit.sequences.sequence import EditSequence
from causalcone.engine.schemas import CHECKPOINT_SCHEMA, PROMPT_KINDS

NEWEST, EARLIER, MODEL = "newest", "earlier", "model"


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """How a sequence is measured: every ``every`` edits, and at its end.

    evaluate: ``Editor.evaluate``; scoring: its options; sample: how many of all edits before the newest batch are
    scored, drawn by ``seed``; held_out: text whose perplexity is measured.
    """

    evaluate: Callable[..., Scores]
    every: int
    sample: int = 100
    seed: int = 0
    held_out: HeldOut | None = None
    scoring: Mapping[str, Any] = field(default_factory=dict)

    def due(self, sequence: EditSequence) -> bool:
        """Whether the sequence is to be measured after the batch that it made last."""
        edits, before = sequence.edits, max(0, sequence.done - 1) * sequence.size
        return edits // self.every > before // self.every or edits == len(sequence.requests)

    def measure(self, sequence: EditSequence) -> pa.RecordBatch:
        """A row for each edit that is scored, and for the model, and metric: the columns of ``CHECKPOINT_SCHEMA``."""
        before = (sequence.done - 1) * sequence.size
        drawn = np.random.default_rng([self.seed, before]).permutation(before)[: self.sample]
        earlier = [sequence.requests[number] for number in sorted(drawn)]
        newest = list(sequence.requests[before : sequence.edits])
        rows = [*self._edits(sequence, NEWEST, newest), *self._edits(sequence, EARLIER, earlier)]
        rows += [
            {"group": MODEL, "metric": name, "pre": pre, "post": post} for name, pre, post in self._health(sequence)
        ]
        common = {"problem": newest[0].problem, "method": sequence.method.name, "edits": sequence.edits}
        common |= {"window": sequence.window.size, "layer": sequence.window.layer}
        rows = [{**common, **row} for row in rows]
        return pa.RecordBatch.from_pylist(rows, schema=CHECKPOINT_SCHEMA)

    def _edits(self, sequence: EditSequence, group: str, requests: Sequence[Request]) -> Iterator[dict[str, Any]]:
        if not requests:
            return
        scores = self.evaluate(sequence.standing(requests), **self.scoring)
        facts = {edit.edit_id: edit.fact_id for edit in scores.edits}
        metrics = (tuple(row.values()) for row in scores.metrics.to_pylist())
        for name, metric, pre, post in (*metrics, *_probabilities(scores)):
            yield {"group": group, "fact_id": facts[name], "metric": metric, "pre": pre, "post": post}

    def _health(self, sequence: EditSequence) -> Iterator[tuple[str, float | None, float]]:
        if self.held_out is not None:
            yield "perplexity", self.held_out.unedited(), self.held_out.perplexity(sequence.delta)
        for weight, norm in sequence.relative_norms().items():
            yield f"relative_norm.{weight}", 0.0, norm
        for name, by_layer in sequence.notes().items():
            yield from ((f"{name}.{layer}", value, value) for layer, value in by_layer.items())


def _probabilities(scores: Scores) -> Iterator[tuple[str, str, float | None, float | None]]:
    """By edit and kind of prompt the mean probability of the target, such as ``rewrite_p``."""
    probes = scores.probes.to_pylist()
    for kind in PROMPT_KINDS:
        of_kind: dict[str, list[dict[str, Any]]] = {}
        for row in probes:
            if row["prompt_kind"] == kind:
                of_kind.setdefault(row["edit_id"], []).append(row)
        for name, rows in of_kind.items():
            pre, post = (_mean([row[column] for row in rows]) for column in ("p_pre", "p_post"))
            yield name, f"{kind}_p", pre, post


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None
