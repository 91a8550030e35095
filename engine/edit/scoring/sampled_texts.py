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
    """By fact, five texts that the unedited model gives to "{subject} is a": up to 100 tokens with the prompt's (and no
    more when the text is tokenized anew, nor than the model has positions), each one of the five likeliest.

    A fact's texts depend on the model, the seed and the fact's id alone. Raises ``FactError`` for a subject that is too
    long.
    """
    given, sizes = list(facts), session.sizes
    check_unique(given)
    about = [replace(fact, prompt=ESSENCE) for fact in given]
    prompts = [encode(fact, session.tokenizer, "argmax", sizes.vocabulary, sizes.positions).prompt for fact in about]
    texts = [Text(prompt) for prompt in prompts for _ in range(ESSENCE_TEXTS)]
    lengths = [_left(session, fact, prompt) for fact, prompt in zip(about, prompts, strict=True)]
    new = continuations(
        session,
        texts,
        [length for length in lengths for _ in range(ESSENCE_TEXTS)],
        top_k=TOP_K,
        seeds=[text_seed(seed, "essence", fact.id, number) for fact in given for number in range(ESSENCE_TEXTS)],
    )
    whole = [
        [_whole(session, fact.text, prompt, new[number * ESSENCE_TEXTS + i]) for i in range(ESSENCE_TEXTS)]
        for number, (fact, prompt) in enumerate(zip(about, prompts, strict=True))
    ]
    return {fact.id: own for fact, own in zip(given, whole, strict=True)}


def _whole(session: Session, text: str, prompt: Sequence[int], new: tuple[int, ...]) -> str:
    """A text and what new tokens add to it: so many that it has no more tokens than there may be, tokenized anew."""
    limit = len(prompt) + len(new)
    while True:
        whole = text + continued(session, prompt, new)
        if len(session.tokenizer(whole)["input_ids"]) <= limit:
            return whole
        new = new[:-1]


def generate_texts(
    session: Session, requests: Sequence[Request], seed: int, deltas: Sequence[Delta | None] | None = None
) -> list[list[str]]:
    """For each request the texts that the model, changed by the request's delta where there is one, gives to the fact's
    generation prompts: up to 100 tokens with the prompt's, or as many as the model has positions, each one of the five
    likeliest. In Fact Forcing the subject carries its noise.

    What is drawn depends on the seed, the fact's id and the prompt's number alone, so that texts before and after an
    edit differ by the edit. Raises ``FactError`` for a prompt that is too long.
    """
    if deltas is not None and len(deltas) != len(requests):
        raise ExperimentError(f"there are {len(requests)} requests and {len(deltas)} deltas; give one for each")
    encoder = Encoder(session.tokenizer, session.sizes)
    own = [(number, i) for number, each in enumerate(requests) for i in range(len(each.fact.generation_prompts))]
    prompts = [requests[number].fact.generation_prompts[i] for number, i in own]
    texts = [encoder.written(requests[number], prompt) for (number, _), prompt in zip(own, prompts, strict=True)]
    new = continuations(
        session,
        texts,
        [_left(session, requests[number].fact, text.tokens) for (number, _), text in zip(own, texts, strict=True)],
        top_k=TOP_K,
        seeds=[text_seed(seed, "generation", requests[number].fact.id, i) for number, i in own],
        deltas=None if deltas is None else [deltas[number] for number, _ in own],
    )
    written: list[list[str]] = [[] for _ in requests]
    for (number, _), prompt, text, tokens in zip(own, prompts, texts, new, strict=True):
        written[number].append(prompt + continued(session, text.tokens, tokens))
    return written


def _left(session: Session, fact: Fact, prompt: Sequence[int]) -> int:
    """How many tokens a text may have behind its prompt."""
    limit = min(TEXT_TOKENS, session.sizes.positions)
    if len(prompt) >= limit:
        raise FactError(
            f"fact {fact.id!r}: a prompt of {len(prompt)} tokens leaves no room for a text of {limit}; shorten it"
        )
    return limit - len(prompt)
