"""Requests: a fact, a problem, and the target that is trained towards or away from (docs/editing.md, "Problems")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from causalcone.engine.errors import ExperimentError, one_of
from causalcone.engine.facts import Fact
from causalcone.engine.schemas import PROBLEMS

ERROR_INJECTION, TRACING_REVERSAL, FACT_ERASURE, FACT_AMPLIFICATION, FACT_FORCING = PROBLEMS
NOISY = (TRACING_REVERSAL, FACT_FORCING)
"""The problems whose subjects carry noise."""

_EDITED = ("id", "prompt", "subject", "target_true", "target_new", "joiner")


@dataclass(frozen=True)
class Request:
    """A fact to be edited. target: token ids that are trained towards (in Fact Erasure: away from) and scored; other:
    those of the other answer, which is scored too, where there is one; sigma: the level of the noise that the subject
    carries wherever it occurs, in Fact Forcing, else None; answers: target and other in words, which become tokens
    after each prompt anew; None: the token ids hold after every prompt."""

    fact: Fact
    problem: str
    target: tuple[int, ...]
    other: tuple[int, ...] | None = None
    sigma: float | None = None
    answers: tuple[str | None, str | None] = (None, None)

    def __post_init__(self) -> None:
        one_of("problem", self.problem, PROBLEMS)
        if not self.target:
            raise ExperimentError(f"fact {self.fact.id!r}: the request's target has no tokens; give at least one")
        if (self.sigma is None) == (self.problem == FACT_FORCING):
            raise ExperimentError(
                f"fact {self.fact.id!r}: a request of {self.problem} has sigma {self.sigma}; Fact Forcing needs one, "
                "and no other problem has one"
            )

    @property
    def record(self) -> dict[str, Any]:
        """What is edited, as values of JSON; of the fact no further prompts."""
        fact = {name: getattr(self.fact, name) for name in _EDITED}
        return {**vars(self), "fact": fact}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Request:
        """The request of a ``record`` that was written and read as JSON."""
        lists = {key: tuple(value) for key, value in record.items() if isinstance(value, list)}
        return cls(**{**record, **lists, "fact": Fact.from_record(record["fact"])})

    @property
    def erases(self) -> bool:
        """Whether the target is to become unlikely."""
        return self.problem == FACT_ERASURE

    @property
    def trains_new(self) -> bool:
        """Whether the target replaces the fact's true one."""
        return self.problem in (ERROR_INJECTION, TRACING_REVERSAL)
