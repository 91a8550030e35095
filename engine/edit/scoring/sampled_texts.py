"""Texts that edits are scored on, sampled from models (docs/editing.md, "Scores")."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.requests.prompts import ESSENCE, Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.runs.decoding import continuations, text_seed
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.edit.texts.contexts import TOP_K, continued
from causalcone.engine.errors import ExperimentError, FactError
from causalcone.engine.facts import Fact, check_unique
from causalcone.engine.run.session import Session

ESSENCE_TEXTS = 5
TEXT_TOKENS = 100


def essence_texts(session: Session, facts: Iterable[Fact], seed: int) -> dict[str, list[str]]:
    """By fact, five texts with which the unedited model continues "{subject} is a": up to 100 tokens with the prompt's
    (and no more when the text is tokenized anew, nor than the model has positions), each one of the five likeliest.
    They depend on the model, the seed and the fact's id alone."""
    facts = list(facts)
    check_unique(facts)
    about = [replace(fact, prompt=ESSENCE) for fact in facts]
    prompts = [session.prompts.text.fact(fact, "argmax").prompt for fact in about]
    texts = [
        (fact, Text(prompt), text_seed(seed, "essence", fact.id, number))
        for fact, prompt in zip(about, prompts, strict=True)
        for number in range(ESSENCE_TEXTS)
    ]
    new = iter(_sampled(session, texts))
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
    session: Session,
    requests: Sequence[Request],
    seed: int,
    deltas: Sequence[Delta | None] | None = None,
    encoder: Encoder | None = None,
) -> list[list[str]]:
    """For each request the texts with which the model, changed by the request's delta where there is one, continues the
    fact's generation prompts, in Fact Forcing with noise: lengths and tokens as in ``essence_texts``. Random numbers
    depend on the seed, the fact's id and the prompt's number alone: before and after an edit they are the same."""
    if deltas is not None and len(deltas) != len(requests):
        raise ExperimentError(f"there are {len(requests)} requests and {len(deltas)} deltas; give one for each")
    encoder = encoder or Encoder(session.prompts, session.sizes)
    texts = [
        (request.fact, encoder.free(request, prompt), text_seed(seed, "generation", request.fact.id, index))
        for request in requests
        for index, prompt in enumerate(request.fact.generation_prompts)
    ]
    pairs = zip(requests, deltas or [None] * len(requests), strict=True)
    new = _sampled(session, texts, [delta for request, delta in pairs for _ in request.fact.generation_prompts])
    written = (continued(session, text.tokens, tokens) for (_, text, _), tokens in zip(texts, new, strict=True))
    return [[prompt + next(written) for prompt in request.fact.generation_prompts] for request in requests]


def _sampled(
    session: Session, texts: Sequence[tuple[Fact, Text, int]], deltas: Sequence[Delta | None] | None = None
) -> list[tuple[int, ...]]:
    """The tokens that continue texts about facts, each sampled with its seed."""
    lengths = [text_room(session, fact, text) for fact, text, _ in texts]
    seeds = [seed for *_, seed in texts]
    return continuations(session, [text for _, text, _ in texts], lengths, top_k=TOP_K, seeds=seeds, deltas=deltas)


def text_room(session: Session, fact: Fact, prompt: Text) -> int:
    """How many tokens a text may have after its prompt."""
    limit = min(TEXT_TOKENS, session.sizes.positions)
    if len(prompt) >= limit:
        raise FactError(
            f"fact {fact.id!r}: a prompt of {len(prompt)} tokens leaves no room for a text of {limit}; shorten it"
        )
    return limit - len(prompt)
