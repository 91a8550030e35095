"""Texts that models generate about requests, which may each have a change of weights."""

from __future__ import annotations

from collections.abc import Sequence

from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.scoring.sampled_texts import generated, generation_prompts
from causalcone.engine.run.session import Session


def generate_texts(
    session: Session, requests: Sequence[Request], seed: int, deltas: Sequence[Delta | None] | None = None
) -> list[list[str]]:
    """For each request its generation prompts with what follows."""
    encoder = Encoder(session.prompts, session.sizes)
    prompts = [generation_prompts(session, encoder, request, seed) for request in requests]
    pairs = zip(prompts, deltas or [None] * len(requests), strict=True)
    asked = [(prompt, delta) for own, delta in pairs for prompt in own]
    texts = iter(generated(session, [prompt for prompt, _ in asked], [delta for _, delta in asked]))
    return [[prompt.prompt + next(texts) for prompt in own] for own in prompts]
