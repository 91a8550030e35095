"""Texts that edits are scored on, sampled from models (docs/editing.md, "Scores")."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.requests.prompts import ESSENCE, Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.runs.decoding import continuations, text_seed
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.edit.scoring.written import OpenPrompt
from causalcone.engine.edit.texts.contexts import TOP_K, continued
from causalcone.engine.errors import FactError
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
        (Text(prompt), text_room(session, fact, Text(prompt)), text_seed(seed, "essence", fact.id, number))
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


def generation_prompts(session: Session, encoder: Encoder, request: Request, seed: int) -> list[OpenPrompt]:
    """What a fact's texts are generated after, in Fact Forcing with noise. Random numbers depend on the seed, the
    fact's id and the prompt's number alone: before and after an edit they are the same."""
    prompts = []
    for number, text in enumerate(request.fact.generation_prompts):
        tokens, own = encoder.free(request, text), text_seed(seed, "generation", request.fact.id, number)
        room = text_room(session, request.fact, tokens)
        prompts.append(OpenPrompt("generation", number, text, tokens, room=room, seed=own))
    return prompts


def generated(session: Session, prompts: Sequence[OpenPrompt], deltas: Sequence[Delta | None]) -> list[str]:
    """The text that the model, changed by a prompt's delta where there is one, puts after each of
    ``generation_prompts``: lengths and tokens as in ``essence_texts``."""
    new = _sampled(session, [(prompt.tokens, prompt.room, prompt.seed) for prompt in prompts], deltas)
    return [continued(session, prompt.tokens.tokens, own) for prompt, own in zip(prompts, new, strict=True)]


def _sampled(
    session: Session, texts: Sequence[tuple[Text, int, int]], deltas: Sequence[Delta | None] | None = None
) -> list[tuple[int, ...]]:
    """The tokens that continue texts, each with so much room and sampled with its seed."""
    begun, rooms, seeds = [text for text, _, _ in texts], [room for _, room, _ in texts], [seed for *_, seed in texts]
    return continuations(session, begun, rooms, top_k=TOP_K, seeds=seeds, deltas=deltas)


def text_room(session: Session, fact: Fact, prompt: Text) -> int:
    """How many tokens a text may have after its prompt."""
    limit = min(TEXT_TOKENS, session.sizes.positions)
    if len(prompt) >= limit:
        raise FactError(
            f"fact {fact.id!r}: a prompt of {len(prompt)} tokens leaves no room for a text of {limit}; shorten it"
        )
    return limit - len(prompt)
