"""Recall of facts: the texts with which a model completes prompts, and the probabilities of answers (docs/editing.md,
"Problems")."""

import math
from collections.abc import Sequence

import numpy as np

from causalcone.engine.edit.runs.decoding import continuations
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.encoding import EncodedFact
from causalcone.engine.facts import Fact
from causalcone.engine.localize.causal_tracing import own_trial
from causalcone.engine.plan.interventions import Base, Experiment, Overwrites
from causalcone.engine.run.session import Session

COMPLETION_TOKENS = 36


def completions(session: Session, facts: Sequence[EncodedFact], tokens: int = COMPLETION_TOKENS) -> list[str]:
    """The text of ``tokens`` tokens, each the likeliest, with which the model continues each prompt."""
    texts = [Text(fact.prompt) for fact in facts]
    continued = continuations(session, texts, [tokens] * len(texts))
    return [session.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False) for ids in continued]


def known(session: Session, facts: Sequence[EncodedFact]) -> list[bool]:
    """Whether the likeliest tokens after each prompt are those of the answer."""
    texts, lengths = [Text(fact.prompt) for fact in facts], [len(fact.target) for fact in facts]
    found = continuations(session, texts, lengths)
    return [tokens == tuple(fact.target) for fact, tokens in zip(facts, found, strict=True)]


def completes(fact: Fact, completion: str) -> bool:
    return fact.target_true.strip().lower() in completion.lower()


def answer_probabilities(session: Session, facts: Sequence[EncodedFact]) -> list[float]:
    """p(target_true) after each prompt, all of its tokens."""
    clean = Experiment((Base(),), np.empty(0, dtype=np.int64), Overwrites.none())
    trials = [own_trial(fact, clean) for fact in facts]
    return [math.exp(result.log_p[0, 0]) for _, result in session.run(trials)]
