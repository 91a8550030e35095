"""Prompts and interventions of one's own, what to read of the runs they make, and the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.errors import ExperimentError
from causalcone.engine.localize.states import KINDS, State

Positions = int | str | Sequence[int]


@dataclass(frozen=True)
class Prompt:
    """A text to run.

    Args:
        text: The text.
        target: The answer whose probability is read at its end; the clean run's most likely token if None.
        others: Texts whose runs interventions can take values from.
    """

    text: str
    target: str | None = None
    others: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Intervention:
    """Values at a site of layers that tokens take from another source.

    Args:
        site: ``"hidden"``, ``"mlp"``, ``"attn"`` or ``"head.N"``.
        layers: Numbers, or one number.
        tokens: Positions in the prompt (negative ones count from its end), one position, or a name: ``"all"``,
            ``"last"``; of facts also ``"subject"``, ``"subject_last"`` and ``"subject_onward"``.
        source: ``"clean"``, ``"corrupted"`` (of facts), ``"zero"``, ``"other"`` (the prompt's first other text;
            ``"other:1"`` the second), or a vector (width,), or one for each prompt (prompts, width): as wide as hidden
            states, or as a head.
        source_tokens: As many positions in the source's text, where they are not the same (negative ones count from the
            source's own end).

    Raises:
        ExperimentError: An argument makes no sense.
    """

    site: str
    layers: int | Iterable[int]
    tokens: Positions
    source: str | Tensor = "clean"
    source_tokens: Positions | None = None

    def __post_init__(self) -> None:
        if self.site == "heads":
            raise ExperimentError("an intervention is on one head; give head.N, and one intervention for each")
        State(self.site)  # checks the name
        object.__setattr__(self, "layers", whole_numbers(self.layers, "layers"))
        for name in ("tokens", "source_tokens"):
            positions = getattr(self, name)
            if positions is not None and not isinstance(positions, str):
                object.__setattr__(self, name, whole_numbers(positions, name))
        if isinstance(self.source, np.ndarray):
            object.__setattr__(self, "source", torch.from_numpy(self.source))
        if not isinstance(self.source, str | Tensor):
            raise ExperimentError(f"the source {self.source!r} is neither a name nor a vector")
        if self.source_tokens is not None and (isinstance(self.source, Tensor) or self.source == "zero"):
            raise ExperimentError("source_tokens go with values of another run; vectors and zero have none")

    @property
    def from_other(self) -> bool:
        return isinstance(self.source, str) and self.source.startswith("other")


@dataclass(frozen=True)
class Read:
    """Values to read of every run besides the target's probability.

    Args:
        what: ``"logits"``, or a site: ``"hidden"``, ``"mlp"`` or ``"attn"``.
        tokens: Positions, one position, or a name, as for ``Intervention``.
        layers: Numbers, or one number, of a site.

    Raises:
        ExperimentError: The name is unknown, or layers are given for logits or missing for a site.
    """

    what: str
    tokens: Positions = -1
    layers: int | Iterable[int] | None = None

    def __post_init__(self) -> None:
        if self.what not in ("logits", *KINDS):
            raise ExperimentError(f"cannot read {self.what!r}; choose logits, hidden, mlp or attn")
        if (self.what == "logits") != (self.layers is None):
            raise ExperimentError(f"reading {self.what} {'needs' if self.layers is None else 'takes no'} layers")
        if self.layers is not None:
            object.__setattr__(self, "layers", whole_numbers(self.layers, "layers"))
        if not isinstance(self.tokens, str):
            object.__setattr__(self, "tokens", whole_numbers(self.tokens, "tokens"))


@dataclass(frozen=True)
class RunValues:
    """Results of runs.

    Attributes:
        p: The target's probability, (samples, runs) float64.
        values: For each ``Read`` a tensor (samples, runs, tokens, vocabulary) of logits, or (samples, runs, layers,
            tokens, hidden) of states.
    """

    p: np.ndarray
    values: tuple[Tensor, ...]

    def __getitem__(self, runs: slice) -> RunValues:
        return RunValues(self.p[:, runs], tuple(value[:, runs] for value in self.values))


@dataclass(frozen=True)
class PromptResult:
    """The runs of one prompt.

    Attributes:
        patched: Runs changed by each list of interventions, in their order.
        clean: The clean run.
        corrupted: The corrupted run, None where there is none.
        others: The runs of the prompt's other texts.
    """

    patched: RunValues
    clean: RunValues
    corrupted: RunValues | None
    others: RunValues


Runs = Sequence[Intervention] | Sequence[Sequence[Intervention]]


def as_runs(interventions: Runs) -> list[list[Intervention]]:
    """One list of interventions per run, from that or from the interventions of a single run."""
    if isinstance(interventions, Intervention):
        raise ExperimentError("interventions are a list; give [intervention] for a single one")
    items: list[Any] = list(interventions)
    single = [item for item in items if isinstance(item, Intervention)]
    lists = [list(item) for item in items if not isinstance(item, Intervention)]
    if single and lists:
        raise ExperimentError("interventions mix single ones with lists; give one list, or one list per run")
    for item in (item for run in lists for item in run):
        if not isinstance(item, Intervention):
            raise ExperimentError(
                f"{item!r} is not an intervention; give cc.Intervention(site, layers, tokens, source)"
            )
    return [single] if single else lists


def whole_numbers(values: int | Iterable[int], name: str) -> tuple[int, ...]:
    try:
        return (index(values),)  # type: ignore[arg-type]
    except TypeError:
        pass
    try:
        return tuple(index(value) for value in values)  # type: ignore[union-attr]
    except TypeError:
        raise ExperimentError(f"{name} {values!r} are not whole numbers") from None
