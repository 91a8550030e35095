"""Evaluation of edits: probes and metrics, and the texts and word weights that serve several evaluations."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import pyarrow as pa

from causalcone.engine.edit.methods.batching import layers_and_batching
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.scoring.answers import answered, conditions_held, match_rows
from causalcone.engine.edit.scoring.generation_metrics import (
    References,
    ReferenceScorer,
    generation_rows,
    generations,
)
from causalcone.engine.edit.scoring.metrics import Row, metrics_of
from causalcone.engine.edit.scoring.probes import ProbeSet, probes_of
from causalcone.engine.edit.scoring.sampled_texts import essence_texts, generation_prompts, text_room
from causalcone.engine.edit.scoring.scoring import EditScorer, Scored, check_edits
from causalcone.engine.edit.scoring.tables import edit_batch, metric_batch, probe_batch, text_batch
from causalcone.engine.edit.scoring.written import Written
from causalcone.engine.facts import Fact
from causalcone.engine.run.session import Session
from causalcone.kernels.precision import each_within


@dataclass(frozen=True)
class Scores:
    """Scores of edits.

    Attributes:
        edits: The edits; those that give no finite probabilities count as failed.
        probes: The columns of ``PROBE_SCHEMA``.
        metrics: The columns of ``METRIC_SCHEMA``.
        texts: The columns of ``TEXT_SCHEMA``; without rows where no texts were asked for.
    """

    edits: list[Edit]
    probes: pa.RecordBatch
    metrics: pa.RecordBatch
    texts: pa.RecordBatch

    @property
    def tables(self) -> dict[str, pa.RecordBatch]:
        """All by name: that of edits comes last, so that none is written before its scores are."""
        return {"texts": self.texts, "probes": self.probes, "metrics": self.metrics, "edits": edit_batch(self.edits)}


@dataclass
class Evaluator:
    session: Session
    encoder: Encoder
    seed: int
    _essence: dict[tuple[object, ...], list[str]] = field(default_factory=dict)
    _scoring: tuple[References, ReferenceScorer] | None = None
    _held: WeakKeyDictionary[Request, tuple[object, list[bool | None]]] = field(default_factory=WeakKeyDictionary)

    def check(
        self,
        request: Request,
        essence: bool,
        generation: bool,
        references: References | None,
        contexts: Iterable[Sequence[str]] = (),
    ) -> Request:
        """The request; raises ``FactError`` for one that cannot be edited in some contexts, or not be scored."""
        probes_of(request, self.encoder)
        for probe in request.fact.probes:
            for condition in probe.conditions:
                self.encoder.followed(request, self.encoder.written(request, condition.prompt), (0,))
        for before in contexts:
            self.encoder.task(request, before)
        if essence:
            text_room(self.session, request.fact, self.encoder.essence(request).text)
        if generation or references is not None:
            generation_prompts(self.session, self.encoder, request, self.seed)
        if references is not None and request.fact.generation_prompts:
            references.of(request.fact)
        return request

    def evaluate(
        self,
        edits: Sequence[Edit],
        essence: bool,
        accuracy: bool,
        generation: bool,
        references: References | None,
        answers: bool,
    ) -> Scores:
        """As ``Editor.evaluate``, which describes the arguments."""
        scored = list(self.score(edits, essence, accuracy))
        rows: list[Row] = [row for result in scored for row in metrics_of(result, accuracy)]
        final = [result.edit for result in scored]
        written: list[Written] = []
        if generation or references is not None:
            if references is not None and (self._scoring is None or self._scoring[0] is not references):
                self._scoring = references, ReferenceScorer(references.corpus)  # kept for further evaluations
            scoring = None if references is None else self._scoring
            written += generations(self.session, final, self.seed, self.encoder)
            rows += generation_rows(written, scoring)
        if answers:
            said = [*answered(self.session, self.encoder, final, self._conditions([edit.request for edit in final]))]
            rows += match_rows(said)
            written += said
        return Scores(final, probe_batch(scored), metric_batch(rows), text_batch(written))

    def score(self, edits: Sequence[Edit], essence: bool = False, accuracy: bool = False) -> Iterator[Scored]:
        if not edits:
            return
        self.session.verify(self.encoder.bare(edits[0].request).text.tokens)
        check_edits(edits, self.session.architecture)
        texts = self._essence_of([edit.request.fact for edit in edits]) if essence else {}
        held = self._conditions([edit.request for edit in edits])

        def edit_probes(edit: Edit) -> ProbeSet:
            return probes_of(edit.request, self.encoder, texts.get(edit.fact_id, ()), held(edit.request))

        scored = EditScorer(*layers_and_batching(self.session), edit_probes, accuracy).score(edits)
        yield from each_within(self.session.computing, map(_checked, scored))

    def _conditions(self, requests: Sequence[Request]) -> Callable[[Request], list[bool | None]]:
        """Whether the conditions of each of a request's own probes hold: seen once, in the model with its present
        weights."""
        weights = self.session.architecture.versions()
        new = [each for each in dict.fromkeys(requests) if self._held.get(each, (None, []))[0] != weights]
        for request, held in zip(new, conditions_held(self.session, self.encoder, new), strict=True):
            self._held[request] = weights, held
        return {request: self._held[request][1] for request in requests}.__getitem__

    def _essence_of(self, facts: Iterable[Fact]) -> dict[str, list[str]]:
        """The essence texts of facts, by their ids: sampled once from the model with its present weights."""
        weights = self.session.architecture.versions()
        keys = {fact.id: (fact.id, fact.subject, weights) for fact in facts}
        new = {fact.id: fact for fact in facts if keys[fact.id] not in self._essence}
        sampled = essence_texts(self.session, new.values(), self.seed)
        self._essence.update({keys[name]: texts for name, texts in sampled.items()})
        return {name: self._essence[key] for name, key in keys.items()}


def _checked(scored: Scored) -> Scored:
    """The same, with an edit as failed where the model, edited or not, gives no finite probabilities."""
    if not scored.pre.finite:
        reason = "the unedited model gives probabilities that are not finite; compute in float32 or bfloat16"
    elif scored.post is None or scored.post.finite:
        return scored
    else:
        reason = "the edited model gives probabilities that are not finite"
    return replace(scored, edit=replace(scored.edit, delta=None, reason=reason), post=None)
