"""Facts, and what to do about those that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from causalcone.engine.errors import CausalconeError, FactError, one_of

Item = TypeVar("Item")
Result = TypeVar("Result")

OnError = Literal["raise", "skip"]
"""What to do about a fact that cannot be used."""
Joiner = Literal["auto", "space", "none"]
"""What stands between a prompt and its answer."""


_FIRST_FIELDS = 14
"""How many of a fact's fields all files have."""


@dataclass(frozen=True)
class ProbeCondition:
    """What must be so before an edit for a probe to say anything: the unedited model answers a prompt so.

    Args:
        prompt: The prompt.
        answers: Accepted answers.
    """

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class FactProbe:
    """A prompt with answers of its own, looked at before and after an edit.

    Args:
        group: What it probes, which scores are grouped by: such as ``"portability/Reasoning"`` (answers that should
            follow from the edit) or ``"locality/Forgetfulness"`` (answers that should stay).
        prompt: The prompt, filled.
        answers: Accepted answers, at least one.
        name: What tables call it; empty where it has no name.
        conditions: What must be so before the edit.
        every: Whether all conditions must hold, not one of them.

    Raises:
        FactError: A text is empty, or there is no answer.
    """

    group: str
    prompt: str
    answers: tuple[str, ...]
    name: str = ""
    conditions: tuple[ProbeCondition, ...] = ()
    every: bool = False

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> FactProbe:
        """The probe of a record that was written and read as JSON."""
        conditions = tuple(ProbeCondition(each["prompt"], tuple(each["answers"])) for each in record["conditions"])
        return cls(**{**record, "answers": tuple(record["answers"]), "conditions": conditions})

    def __post_init__(self) -> None:
        for name in ("group", "prompt"):
            if not getattr(self, name).strip():
                raise FactError(f"a probe's {name} is empty; give a text")
        for prompt, answers in [(self.prompt, self.answers), *((c.prompt, c.answers) for c in self.conditions)]:
            if not answers or not all(answer.strip() for answer in answers):
                raise FactError(f"the probe {prompt!r} has answers {answers!r}; give one visible answer at least")


@dataclass(frozen=True)
class Fact:
    """One fact: a prompt about a subject, its answer, and the prompts that go with it.

    Facts without ``target_new`` and evaluation prompts can still be traced.

    Args:
        id: Names the fact in tables and messages.
        prompt: A template with one ``{}`` for the subject.
        subject: The words that the prompt is about.
        target_true: The answer that completes the prompt.
        target_new: Another answer, for edits.
        paraphrase_prompts: Other prompts for the same answer.
        neighborhood_prompts: Prompts about other subjects.
        attribute_prompts: Prompts about subjects that have the new answer.
        generation_prompts: Beginnings of texts about the subject.
        counterfactual_subject: Subject of a counterfactual prompt of equal token length.
        relation_id: Wikidata's identifier as CounterFact gives it; target_true_id and target_new_id likewise.
        neighborhood_target: The neighbours' own answer, where it is not ``target_true``.
        target_true_aliases: Other words for ``target_true``; target_new_aliases likewise.
        probes: Further prompts, each with answers of its own.
        joiner: What joins answers to the prompts: ``"space"``, ``"none"``, or ``"auto"``: nothing after white space,
            an opening quote or bracket, or where the answer's script has no spaces, and else one space.

    Raises:
        FactError: A text is missing or empty, or the prompt has no single ``{}``.
    """

    id: str
    prompt: str
    subject: str
    target_true: str
    target_new: str | None = None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    attribute_prompts: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    counterfactual_subject: str | None = None
    relation_id: str | None = None
    target_true_id: str | None = None
    target_new_id: str | None = None
    neighborhood_target: str | None = None
    target_true_aliases: tuple[str, ...] = ()
    target_new_aliases: tuple[str, ...] = ()
    probes: tuple[FactProbe, ...] = ()
    joiner: Joiner = "auto"

    def __post_init__(self) -> None:
        for name in ("id", "prompt", "subject", "target_true"):
            if not isinstance(getattr(self, name), str):
                raise FactError(f"fact {self.id!r}: {name} is {getattr(self, name)!r}; give a text")
        if self.prompt.count("{}") != 1:
            raise FactError(
                f"fact {self.id!r}: the prompt {self.prompt!r} must hold exactly one '{{}}' where the subject goes"
            )
        if not self.subject.strip():
            raise FactError(f"fact {self.id!r}: the subject is empty; give the words that the prompt is about")
        if not self.target_true.strip():
            raise FactError(f"fact {self.id!r}: target_true is empty; give the answer that completes the prompt")
        one_of(f"fact {self.id!r}: joiner", self.joiner, get_args(Joiner), FactError)

    @property
    def record(self) -> dict[str, Any]:
        """All of it as values of JSON. Fields that files of before do not have are there where they are set."""
        younger = {field.name: field.default for field in fields(self)[_FIRST_FIELDS:]}
        return {key: value for key, value in asdict(self).items() if key not in younger or value != younger[key]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Fact:
        """The fact of a ``record`` that was written and read as JSON."""
        lists = {key: tuple(value) for key, value in record.items() if isinstance(value, list)}
        probes = tuple(FactProbe.from_record(probe) for probe in record.get("probes", ()))
        return cls(**{**record, **lists, "probes": probes})

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @property
    def subject_characters(self) -> tuple[int, int]:
        """The half-open character range of the subject in ``text``."""
        start = self.prompt.index("{}")
        return start, start + len(self.subject)


def prompt_fact(prompt: str, subject: str, answer: str) -> Fact:
    """The fact of a prompt with its subject, or ``{}``, in it; ``Tracer.fact`` says more."""
    if "{}" not in prompt and subject not in prompt:
        raise FactError(f"the subject {subject!r} is not in the prompt {prompt!r}; give words that are in it")
    template = prompt if "{}" in prompt or not subject else prompt.replace(subject, "{}", 1)
    return Fact("prompt", template, subject, answer)


def check_unique(facts: Iterable[Fact]) -> None:
    """Raise ``FactError`` naming the first id that two facts share."""
    seen = set()
    for fact in facts:
        if fact.id in seen:
            raise FactError(f"two facts have the id {fact.id!r}; ids must be unique")
        seen.add(fact.id)


@dataclass(frozen=True)
class Skipped:
    """A fact that is left out, and why."""

    fact_id: str
    reason: str


class SkippedFacts(UserWarning):
    """Facts left out under ``on_error="skip"``; ``reasons`` has a line for each, and so has the message."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"{len(reasons)} facts skipped:\n" + "\n".join(reasons))


def usable(
    items: Iterable[Item], make: Callable[[Item], Result], fact_id: Callable[[Item], str], on_error: OnError
) -> tuple[list[Result], list[Skipped]]:
    """What ``make`` makes of items, and those that it refuses, where that is no error to end with."""
    one_of("on_error", on_error, get_args(OnError))
    results, skipped = [], []
    for item in items:
        try:
            results.append(make(item))
        except CausalconeError as error:
            if on_error == "raise":
                raise
            skipped.append(Skipped(fact_id(item), str(error)))
    return results, skipped
