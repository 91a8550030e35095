"""Recall of facts: the texts with which a model completes prompts, and the probabilities of answers (docs/editing.md,
"Problems")."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from causalcone.engine.edit.runs.decoding import continuations
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.encoding import EncodedFact, token_texts
from causalcone.engine.facts import Fact
from causalcone.engine.localize.causal_tracing import own_trial
from causalcone.engine.plan.interventions import Base, Experiment, Overwrites
from causalcone.engine.run.session import Session

COMPLETION_TOKENS = 36
LIKELIEST = 5


def completions(session: Session, facts: Sequence[EncodedFact], tokens: int = COMPLETION_TOKENS) -> list[str]:
    """The text of ``tokens`` tokens, each the likeliest, with which the model continues each prompt."""
    texts = [Text(fact.prompt) for fact in facts]
    continued = continuations(session, texts, [tokens] * len(texts))
    return [session.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False) for ids in continued]


def known(session: Session, facts: Sequence[EncodedFact]) -> list[bool]:
    """Whether the answer is the text of the likeliest token after each prompt, or of as many as the answer has."""
    texts, lengths = [Text(fact.prompt) for fact in facts], [len(fact.target) for fact in facts]
    found = continuations(session, texts, lengths)
    return [
        any(session.tokenizer.decode(list(said)).strip() == fact.fact.target_true.strip() for said in (new[:1], new))
        for fact, new in zip(facts, found, strict=True)
    ]


def completes(fact: Fact, completion: str) -> bool:
    return fact.target_true.strip().lower() in completion.lower()


def answer_probabilities(session: Session, facts: Sequence[EncodedFact]) -> list[float]:
    """p(target_true) after each prompt, all of its tokens."""
    return [p for p, _ in known_answers(session, facts, 0)]


def known_answers(
    session: Session, facts: Sequence[EncodedFact], likeliest: int = LIKELIEST
) -> list[tuple[float, list[dict[str, Any]]]]:
    """p(target_true) after each prompt, all of its tokens; and as many of its likeliest next tokens, the likeliest
    first: their text (``token``) and probability (``p``)."""
    trials = []
    for fact in facts:
        last = np.array([(0, len(fact.prompt) - 1)][:likeliest], dtype=np.int64).reshape(-1, 2)
        clean = Experiment((Base(),), np.empty(0, dtype=np.int64), Overwrites.none(), logits=last)
        trials.append(own_trial(fact, clean))
    answers = []
    for _, result in session.run(trials):
        p, ids = result.logits.double().softmax(-1).flatten().topk(likeliest)
        texts = token_texts(ids.tolist(), session.tokenizer)
        tokens = [{"token": text, "p": value} for text, value in zip(texts, p.tolist(), strict=True)]
        answers.append((math.exp(result.log_p[0, 0]), tokens))
    return answers
