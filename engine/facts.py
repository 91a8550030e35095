"""A fact, and its encoding: token ids, subject span, target ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from causalcone.engine.errors import FactError


@dataclass(frozen=True)
class Fact:
    """One fact: a prompt template with one ``{}`` for the subject, and the targets and prompts that go with it.

    ``target_new`` and the evaluation prompts may be missing: such facts can still be traced.
    ``counterfactual_subject`` is the subject of a counterfactual prompt of equal token length.
    ``relation_id``, ``target_true_id`` and ``target_new_id`` are the identifiers CounterFact gives (Wikidata's).
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

    def __post_init__(self) -> None:
        if self.prompt.count("{}") != 1:
            raise FactError(
                f"fact {self.id!r}: the prompt {self.prompt!r} must hold exactly one '{{}}' where the subject goes"
            )
        if not self.subject.strip():
            raise FactError(f"fact {self.id!r}: the subject is empty; give the words that the prompt is about")
        if not self.target_true.strip():
            raise FactError(f"fact {self.id!r}: target_true is empty; give the answer the prompt should be completed with")

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @property
    def subject_characters(self) -> tuple[int, int]:
        """The half-open character range of the subject in ``text``."""
        start = self.prompt.index("{}")
        return start, start + len(self.subject)
