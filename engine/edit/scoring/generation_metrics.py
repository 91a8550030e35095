"""What edited models write: its entropy, and how alike it is to texts about the new target (METHODS 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.scoring.metrics import Row
from causalcone.engine.edit.scoring.sampled_texts import generate_texts
from causalcone.engine.edit.scoring.text_metrics import ReferenceScorer, generation_entropy
from causalcone.engine.facts import Fact
from causalcone.engine.run.session import Session


class References(Protocol):
    """Texts about targets: those about a fact's new target, and all of them."""

    def of(self, fact: Fact) -> Sequence[str]: ...

    @property
    def corpus(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Generation:
    """Texts that the model writes after the facts' generation prompts, before and after edits."""

    session: Session
    seed: int
    references: References | None
    scorer: ReferenceScorer | None

    def rows(self, edits: Sequence[Edit]) -> Iterator[Row]:
        """The metrics of each edit whose fact has generation prompts."""
        asked = [edit for edit in edits if edit.request.fact.generation_prompts]
        requests: dict[int, Request] = {id(edit.request): edit.request for edit in asked}
        before = dict(zip(requests, generate_texts(self.session, list(requests.values()), self.seed), strict=True))
        done = [edit for edit in asked if edit.delta is not None]
        written = generate_texts(
            self.session, [edit.request for edit in done], self.seed, [edit.delta for edit in done]
        )
        after = {id(edit): texts for edit, texts in zip(done, written, strict=True)}
        for edit in asked:
            pre, post = before[id(edit.request)], after.get(id(edit))
            entropy = None if post is None else generation_entropy(post)
            yield edit.edit_id, "generation_entropy", generation_entropy(pre), entropy
            if self.scorer is not None and self.references is not None:
                texts = self.references.of(edit.request.fact)
                score = None if post is None else self.scorer.score(post, texts)
                yield edit.edit_id, "reference_score", self.scorer.score(pre, texts), score
