"""Evaluation of edits: probes and metrics, and the texts and word weights that serve several evaluations."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from causalcone.engine.edit.methods.batching import layers_and_batching
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.scoring.generation_metrics import References, ReferenceScorer, generation_rows
from causalcone.engine.edit.scoring.metrics import Row, metrics_of
from causalcone.engine.edit.scoring.probes import ProbeSet, probes_of
from causalcone.engine.edit.scoring.sampled_texts import essence_texts, text_room
from causalcone.engine.edit.scoring.scoring import EditScorer, Scored, check_edits
from causalcone.engine.edit.scoring.tables import metric_batch, probe_batch
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
    """

    edits: list[Edit]
    probes: pa.RecordBatch
    metrics: pa.RecordBatch


@dataclass
class Evaluator:
    session: Session
    encoder: Encoder
    seed: int
    _essence: dict[tuple[object, ...], list[str]] = field(default_factory=dict)
    _scoring: tuple[References, ReferenceScorer] | None = None

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
        for before in contexts:
            self.encoder.task(request, before)
        texts = [self.encoder.essence(request).text] if essence else []
        if generation or references is not None:
            texts += [self.encoder.free(request, prompt) for prompt in request.fact.generation_prompts]
        for text in texts:
            text_room(self.session, request.fact, text)
        if references is not None and request.fact.generation_prompts:
            references.of(request.fact)
        return request

    def evaluate(
        self, edits: Sequence[Edit], essence: bool, accuracy: bool, generation: bool, references: References | None
    ) -> Scores:
        """As ``Editor.evaluate``, which describes the arguments."""
        scored = list(self.score(edits, essence, accuracy))
        rows: list[Row] = [row for result in scored for row in metrics_of(result, accuracy)]
        final = [result.edit for result in scored]
        if generation or references is not None:
            if references is not None and (self._scoring is None or self._scoring[0] is not references):
                self._scoring = references, ReferenceScorer(references.corpus)  # kept for further evaluations
            scoring = None if references is None else self._scoring
            rows += generation_rows(self.session, final, self.seed, scoring, self.encoder)
        return Scores(final, probe_batch(scored), metric_batch(rows))

    def score(self, edits: Sequence[Edit], essence: bool = False, accuracy: bool = False) -> Iterator[Scored]:
        if not edits:
            return
        self.session.verify(self.encoder.bare(edits[0].request).text.tokens)
        check_edits(edits, self.session.sizes)
        texts = self._essence_of([edit.request.fact for edit in edits]) if essence else {}

        def edit_probes(edit: Edit) -> ProbeSet:
            return probes_of(edit.request, self.encoder, texts.get(edit.fact_id, ()))

        scored = EditScorer(*layers_and_batching(self.session), edit_probes, accuracy).score(edits)
        yield from each_within(self.session.computing, map(_checked, scored))

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
