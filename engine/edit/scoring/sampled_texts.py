"""Texts that edits are scored on, sampled from models (docs/editing.md, "Scores")."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.requests.prompts import ESSENCE, Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.runs.decoding import continuations, text_seed
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.edit.texts.contexts import TOP_K, continued
from causalcone.engine.errors import ExperimentError, FactError
from causalcone.engine.facts import Fact, check_unique, encode
from causalcone.engine.run.session import Session

ESSENCE_TEXTS = 5
TEXT_TOKENS = 100


def essence_texts(session: Session, facts: Iterable[Fact], seed: int) -> dict[str, list[str]]:
    """By fact, five texts with which the unedited model continues "{subject} is a": up to 100 tokens with the prompt's
    (and no more when the text is tokenized anew, nor than the model has positions), each one of the five likeliest.
    They depend on the model, the seed and the fact's id alone."""
    facts, sizes = list(facts), session.sizes
    check_unique(facts)
    about = [replace(fact, prompt=ESSENCE) for fact in facts]
    prompts = [encode(fact, session.tokenizer, "argmax", sizes.vocabulary, sizes.positions).prompt for fact in about]
    texts = [Text(prompt) for prompt in prompts for _ in range(ESSENCE_TEXTS)]
    lengths = [
        _room(session, fact, prompt) for fact, prompt in zip(about, prompts, strict=True) for _ in range(ESSENCE_TEXTS)
    ]
    seeds = [text_seed(seed, "essence", fact.id, number) for fact in facts for number in range(ESSENCE_TEXTS)]
    new = iter(continuations(session, texts, lengths, top_k=TOP_K, seeds=seeds))
    return {
        fact.id: [_whole(session, fact.text, prompt, next(new)) for _ in range(ESSENCE_TEXTS)]
        for fact, prompt in zip(about, prompts, strict=True)
    }


def _whole(session: Session, text: str, prompt: Sequence[int], new: tuple[int, ...]) -> str:
    """A text continued by as many of the new tokens as it has when it is tokenized anew, at most."""
    limit = len(prompt) + len(new)
    while True:
        whole = text + continued(session, prompt, new)
        if len(session.tokenizer(whole)["input_ids"]) <= limit:
            return whole
        new = new[:-1]


def generate_texts(
    session: Session, requests: Sequence[Request], seed: int, deltas: Sequence[Delta | None] | None = None
) -> list[list[str]]:
    """For each request the texts with which the model, changed by the request's delta where there is one, continues the
    fact's generation prompts, in Fact Forcing with noise: lengths and tokens as in ``essence_texts``. Random numbers
    depend on the seed, the fact's id and the prompt's number alone: before and after an edit they are the same."""
    if deltas is not None and len(deltas) != len(requests):
        raise ExperimentError(f"there are {len(requests)} requests and {len(deltas)} deltas; give one for each")
    encoder = Encoder(session.tokenizer, session.sizes)
    texts, lengths, seeds, text_deltas = [], [], [], []
    for request, delta in zip(requests, deltas or [None] * len(requests), strict=True):
        for index, prompt in enumerate(request.fact.generation_prompts):
            texts.append(encoder.written(request, prompt))
            lengths.append(_room(session, request.fact, texts[-1].tokens))
            seeds.append(text_seed(seed, "generation", request.fact.id, index))
            text_deltas.append(delta)
    new = continuations(session, texts, lengths, top_k=TOP_K, seeds=seeds, deltas=text_deltas)
    written = (continued(session, text.tokens, tokens) for text, tokens in zip(texts, new, strict=True))
    return [[prompt + next(written) for prompt in request.fact.generation_prompts] for request in requests]


def _room(session: Session, fact: Fact, prompt: Sequence[int]) -> int:
    """How many tokens a text may have after its prompt."""
    limit = min(TEXT_TOKENS, session.sizes.positions)
    if len(prompt) >= limit:
        raise FactError(
            f"fact {fact.id!r}: a prompt of {len(prompt)} tokens leaves no room for a text of {limit}; shorten it"
        )
    return limit - len(prompt)
