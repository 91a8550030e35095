"""A fact, and its encoding: token ids, subject span, target ids."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from causalcone.engine.errors import CausalconeError, ExperimentError, FactError

Item = TypeVar("Item")
Result = TypeVar("Result")

OnError = Literal["raise", "skip"]
"""What to do about a fact that cannot be used."""


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

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @property
    def subject_characters(self) -> tuple[int, int]:
        """The half-open character range of the subject in ``text``."""
        start = self.prompt.index("{}")
        return start, start + len(self.subject)


@dataclass(frozen=True)
class EncodedFact:
    """A fact as token ids. prompt: ids of the filled prompt, special tokens included; span: half-open token range of
    the subject; target: ids of the target, empty where the clean run's own most likely token is the target;
    counterfactual: ids of the prompt about its ``counterfactual_subject``, where the subject is corrupted by that."""

    fact: Fact
    prompt: tuple[int, ...]
    span: tuple[int, int]
    target: tuple[int, ...]
    counterfactual: tuple[int, ...] | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """What runs through the model: the prompt and all target tokens but the last."""
        return self.prompt + self.target[:-1]


def encode(fact: Fact, tokenizer: Any, target: str, vocabulary: int, positions: int) -> EncodedFact:
    """Tokenize a fact (docs/methods.md, "Facts and tokens"); ``target`` is ``"label"`` or ``"argmax"``. Raises
    ``FactError`` where the subject overlaps no token, a token id is outside the model's ``vocabulary``, or prompt and
    target need more than ``positions``."""
    prompt, span = encode_text(fact.text, fact.subject_characters, tokenizer)
    if span is None:
        raise FactError(f"fact {fact.id!r}: the subject {fact.subject!r} overlaps no token of its prompt {fact.text!r}")
    ids = target_ids(fact.target_true, tokenizer) if target == "label" else ()
    if target == "label" and not ids:
        raise FactError(f"fact {fact.id!r}: the target {fact.target_true!r} has no tokens; give a visible word")
    encoded = EncodedFact(fact, prompt, span, ids)
    if len(encoded.tokens) > positions:
        raise FactError(
            f"fact {fact.id!r}: prompt and target need {len(encoded.tokens)} positions, the model has {positions}; "
            "shorten the prompt"
        )
    if max(prompt + ids) >= vocabulary:
        raise FactError(
            f"fact {fact.id!r}: token id {max(prompt + ids)} is outside the model's vocabulary of {vocabulary}; "
            "use the model's own tokenizer"
        )
    return encoded


def encode_text(
    text: str, characters: tuple[int, int], tokenizer: Any
) -> tuple[tuple[int, ...], tuple[int, int] | None]:
    """Token ids of a prompt, with the special tokens that stand before it, and the half-open range of those that
    overlap the half-open range of characters; None where none does."""
    encoding = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    end_of_text = encoding["special_tokens_mask"][::-1]
    appended = end_of_text.index(0) if 0 in end_of_text else 0  # special tokens never stand before the target
    start, end = characters
    covered = [i for i, (a, b) in enumerate(encoding["offset_mapping"]) if a < b and a < end and b > start]
    ids = tuple(encoding["input_ids"][: len(end_of_text) - appended])
    return ids, (covered[0], covered[-1] + 1) if covered else None


def target_ids(target: str, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a target, tokenized alone: with one leading space, be it the text's own or the tokenizer's."""
    word = target.removeprefix(" ")
    marks_words = "".join(tokenizer.tokenize("a")[:1]).startswith("▁")  # bare ones too, as Llama's tokenizer does
    return tuple(tokenizer(word if marks_words else " " + word, add_special_tokens=False)["input_ids"])


def subject_ids(fact: Fact, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of the subject alone: no leading space, default special tokens, as the noise level has it."""
    return tuple(tokenizer(fact.subject)["input_ids"])


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token by itself, a leading space included; bytes that are no whole character show as U+FFFD.
    Decoders may take away the space that begins a text, so every token is decoded after a letter."""
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = len(tokenizer.decode(letter, clean_up_tokenization_spaces=False))
    return [tokenizer.decode([*letter, i], clean_up_tokenization_spaces=False)[start:] for i in ids]


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
    if on_error not in get_args(OnError):
        raise ExperimentError(f"on_error is {on_error!r}; choose 'raise' or 'skip'")
    results, skipped = [], []
    for item in items:
        try:
            results.append(make(item))
        except CausalconeError as error:
            if on_error == "raise":
                raise
            skipped.append(Skipped(fact_id(item), str(error)))
    return results, skipped
