"""Requests are checked before anything is computed for them."""

from __future__ import annotations

from dataclasses import dataclass

from causalcone.engine.edit.methods.value_search import EditObjective
from causalcone.engine.edit.requests.prompts import ESSENCE, Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.scoring.probes import probes_of
from causalcone.engine.edit.scoring.sampled_texts import TEXT_TOKENS
from causalcone.engine.edit.texts.contexts import Contexts
from causalcone.engine.errors import FactError
from causalcone.engine.run.session import Session
from causalcone.runners.edits.settings import EditPlan
from causalcone.runners.inputs.reference_texts import ReferenceTexts
from causalcone.runners.options import ScoringOptions


@dataclass(frozen=True)
class EditChecks:
    """Raises ``FactError`` if a prompt or text derived from a request cannot be used. contexts: those that are put
    before prompts, where they are known."""

    session: Session
    plan: EditPlan
    contexts: Contexts | None
    scoring: ScoringOptions
    references: ReferenceTexts | None

    def __call__(self, request: Request) -> Request:
        encoder = Encoder(self.session.tokenizer, self.session.sizes)
        probes_of(request, encoder)
        if self.contexts is not None:
            for setting in self.plan.of_contexts:
                EditObjective.of([request], encoder, getattr(self.contexts, str(setting.definition.contexts)))
        if self.scoring.essence:
            self._room(request, len(encoder.prompted(request, ESSENCE).text))
        if self.scoring.generation or self.references is not None:
            for prompt in request.fact.generation_prompts:
                self._room(request, len(encoder.written(request, prompt)))
        if self.references is not None and request.fact.generation_prompts:
            self.references.of(request.fact)
        return request

    def _room(self, request: Request, tokens: int) -> None:
        limit = min(TEXT_TOKENS, self.session.sizes.positions)
        if tokens >= limit:
            raise FactError(
                f"fact {request.fact.id!r}: a prompt of {tokens} tokens leaves no room for a text of {limit}; "
                "shorten it"
            )
