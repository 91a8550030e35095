"""Requests from facts: the target that each problem trains towards, and the facts it is posed for."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from causalcone.engine.edit.requests.prompts import subject_noise
from causalcone.engine.edit.requests.requests import (
    ERROR_INJECTION,
    FACT_ERASURE,
    FACT_FORCING,
    NOISY,
    TRACING_REVERSAL,
    Request,
)
from causalcone.engine.edit.runs.decoding import continuations, text_seed
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.edit.texts.contexts import TOP_K, continued
from causalcone.engine.edit.texts.recall import COMPLETION_TOKENS, answer_probabilities, completes, completions
from causalcone.engine.encoding import EncodedFact, target_ids
from causalcone.engine.errors import ExperimentError, FactError, one_of
from causalcone.engine.facts import Fact, OnError, Skipped, check_unique, usable
from causalcone.engine.localize.options import DEFAULT_SIGMA
from causalcone.engine.run.session import Session
from causalcone.engine.schemas import PROBLEMS

REVERSAL_TOKENS = 12
ERASABLE = 0.02


class FilteredFacts(UserWarning):
    """Facts that a problem is not posed for, because of the model's answers; ``reasons`` has a line for each, like the
    message."""

    def __init__(self, problem: str, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"{problem} is not posed for {len(reasons)} facts:\n" + "\n".join(reasons))


def make_requests(
    session: Session,
    facts: Iterable[Fact],
    problem: str,
    sigma: float | str = DEFAULT_SIGMA,
    *,
    filtered: bool = True,
    on_error: OnError = "raise",
    compat: str | None = None,
    seed: int = 0,
) -> tuple[list[Request], list[Skipped], list[Skipped]]:
    """The requests of a problem; the facts that cannot be used; and those left out because of the model's answers.

    sigma: the level of the noise on the subject, in Fact Forcing and Tracing Reversal. filtered: leave out facts that
    the model does not complete (its 36 likeliest tokens, one after the other, do not contain the answer), in Fact
    Erasure also those whose answer has p < 0.02. compat: ``"published"`` drops p <= 0.02 in every problem, and trains
    Tracing Reversal towards the prompt followed by a continuation that is sampled (top-k 5), under ``seed``.
    """
    facts = list(facts)
    level = 0.0
    if problem in NOISY:
        known, _ = usable(facts, session.prompts.fact, lambda fact: fact.id, on_error)
        level = session.noise_level(sigma, [encoded.fact for encoded in known] or facts)
    making = _Making(session, problem, level, filtered, compat, seed)
    check_unique(facts)
    posed, skipped = usable(facts, making.checked, lambda fact: fact.id, on_error)
    session.tell([item.encoded for item in posed])
    unposed: list[Skipped] = []
    if filtered:
        for reasons in (making.incomplete, making.unlikely):
            posed = _split(posed, reasons(posed), unposed)
    if problem != TRACING_REVERSAL:
        return [making.request(fact) for fact in posed], skipped, unposed
    noised = making.noised(posed)
    requests, unchanged = usable(noised, making.reversal, lambda answer: answer[0].fact.id, on_error)
    order = {fact.id: number for number, fact in enumerate(facts)}
    return requests, sorted(skipped + unchanged, key=lambda fact: order[fact.fact_id]), unposed


@dataclass(frozen=True)
class _Posed:
    """A fact, its prompt and target_true as token ids, and its target_new, if it has one."""

    encoded: EncodedFact
    new: tuple[int, ...] | None

    @property
    def fact(self) -> Fact:
        return self.encoded.fact


def _split(posed: Sequence[_Posed], reasons: Iterable[str | None], unposed: list[Skipped]) -> list[_Posed]:
    """The facts without a reason to leave them out; the others go to ``unposed``."""
    pairs = list(zip(posed, reasons, strict=True))
    unposed += [Skipped(item.fact.id, f"fact {item.fact.id!r}: {reason}") for item, reason in pairs if reason]
    return [item for item, reason in pairs if reason is None]


_Noised = tuple[_Posed, tuple[int, ...], tuple[int, ...] | None]
"""A fact, and the model's answers to its prompt with noise on the subject and, where needed, without."""


@dataclass(frozen=True)
class _Making:
    """The arguments of ``make_requests``, and its steps. level: of the noise, zero where there is none."""

    session: Session
    problem: str
    level: float
    filtered: bool
    compat: str | None
    seed: int

    def __post_init__(self) -> None:
        one_of("problem", self.problem, PROBLEMS)
        one_of("compat", self.compat, (None, "published"))
        if self.problem in NOISY and self.level == 0:
            raise ExperimentError(
                f"sigma is 0; {self.problem} needs the level of the subject's noise, a positive number"
            )

    def checked(self, fact: Fact) -> _Posed:
        """The fact as token ids; refuses a fact that is unusable whatever the model answers."""
        sizes, encoded = self.session.sizes, self.session.prompts.fact(fact)
        new = None if fact.target_new is None else self._new(fact, fact.target_new)
        if self.problem == ERROR_INJECTION and new is None:
            raise FactError(f"fact {fact.id!r} has no target_new; give the answer that the error injects")
        if self.problem == ERROR_INJECTION and new == encoded.target:
            raise FactError(
                f"fact {fact.id!r}: target_new {fact.target_new!r} is the same answer as target_true; give another, or "
                "the problem fact_amplification, which trains towards the true answer"
            )
        needed = len(encoded.prompt) + COMPLETION_TOKENS - 1
        if self.filtered and needed > sizes.positions:
            raise FactError(
                f"fact {fact.id!r}: to see whether the model knows it takes {needed} positions, the model has "
                f"{sizes.positions}; shorten the prompt, or give filtered=False"
            )
        return _Posed(encoded, new)

    def _new(self, fact: Fact, target: str) -> tuple[int, ...]:
        """Token ids of target_new."""
        if not target.strip():
            raise FactError(f"fact {fact.id!r}: target_new {target!r} is empty; give a visible word, or None")
        try:
            return self.session.prompts.fact(replace(fact, target_true=target)).target
        except FactError as error:
            raise FactError(f"{error} (this is about target_new)") from None

    def incomplete(self, posed: Sequence[_Posed]) -> Iterator[str | None]:
        """For each fact that the model does not complete, the reason."""
        texts = completions(self.session, [item.encoded for item in posed])
        for item, text in zip(posed, texts, strict=True):
            target = item.fact.target_true
            yield None if completes(item.fact, text) else f"the model says {text!r}, not {target!r}"

    def unlikely(self, posed: Sequence[_Posed]) -> Iterator[str | None]:
        """For each fact whose answer is too unlikely for the problem, the reason."""
        published = self.compat == "published"
        if self.problem != FACT_ERASURE and not published:
            yield from [None] * len(posed)
            return
        least = "more than" if published else "at least"
        for item, p in zip(posed, answer_probabilities(self.session, [item.encoded for item in posed]), strict=True):
            likely = p > ERASABLE or (p == ERASABLE and not published)
            yield None if likely else f"p({item.fact.target_true!r}) is {p:.3g}, not {least} {ERASABLE}"

    def noised(self, posed: Sequence[_Posed]) -> list[_Noised]:
        """Answers under noise, up to 12 tokens with the prompt's, at least one: likeliest, or as published, sampled."""
        prompts = [Text(item.encoded.prompt) for item in posed]
        spans, hidden = [item.encoded.span for item in posed], self.session.sizes.hidden
        noises = [subject_noise(self.level, span, hidden) for span in spans]
        noised = [Text(text.tokens, *noise) for text, noise in zip(prompts, noises, strict=True)]
        lengths = [max(1, REVERSAL_TOKENS - len(text)) for text in prompts]
        if self.compat == "published":
            seeds = [text_seed(self.seed, "reversal", item.fact.id) for item in posed]
            answers = continuations(self.session, noised, lengths, top_k=TOP_K, seeds=seeds)
            return [(item, answer, None) for item, answer in zip(posed, answers, strict=True)]
        answers = continuations(self.session, noised + prompts, lengths * 2)
        return list(zip(posed, answers[: len(posed)], answers[len(posed) :], strict=True))

    def reversal(self, noised: _Noised) -> Request:
        posed, answer, clean = noised
        encoded, fact = posed.encoded, posed.fact
        if self.compat == "published":
            text = fact.text + continued(self.session, encoded.prompt, answer)
            return Request(fact, self.problem, target_ids(text, self.session.tokenizer), encoded.target)
        if answer in (clean, encoded.target):
            raise FactError(
                f"fact {fact.id!r}: with noise of level {self.level:g} on its subject the model says "
                f"{self.session.tokenizer.decode(list(answer))!r}, which is its answer without noise too; raise "
                "sigma, or leave the fact out"
            )
        return Request(fact, self.problem, answer, encoded.target, answers=(None, fact.target_true))

    def request(self, posed: _Posed) -> Request:
        if self.problem == ERROR_INJECTION and posed.new is not None:
            answers = posed.fact.target_new, posed.fact.target_true
            return Request(posed.fact, self.problem, posed.new, posed.encoded.target, answers=answers)
        sigma = self.level if self.problem == FACT_FORCING else None
        return Request(
            posed.fact, self.problem, posed.encoded.target, posed.new, sigma,
            answers=(posed.fact.target_true, posed.fact.target_new),
        )  # fmt: skip
