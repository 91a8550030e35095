"""Which of the settings that were tried is chosen, by their mean scores (Hase et al. 2023; METHODS 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from causalcone.engine.errors import ExperimentError

ROUNDING = 1e-9
"""What a difference of two scores may be off by."""


@dataclass(frozen=True)
class Candidate:
    """Mean scores of a setting, None where no edit has one. caution: of settings that do equally well, the one with
    more of it is chosen; it is compared number by number."""

    rewrite: float | None
    paraphrase: float | None
    neighborhood: float | None
    caution: tuple[float, ...] = ()


@dataclass(frozen=True)
class TunedChoice:
    """The number of the chosen setting. note: what rule it does not meet, where none of the settings does."""

    number: int
    note: str | None = None


def choose(candidates: Sequence[Candidate], most: float = 0.99, give_up: float = 0.05) -> TunedChoice:
    """The setting with the highest rewrite score that is not above ``most`` and gives up little for it.

    - Admissible are settings whose rewrite score is at most ``most``. If there are none, the one with the lowest
      rewrite score is chosen, with a note.
    - Of these, settings whose paraphrase or neighbourhood score is more than ``give_up`` below the best that an
      admissible one has are dropped. If that leaves none, since the best of the two scores are different settings', the
      one is chosen whose larger loss of the two is the smallest, with a note.
    - Of what is left, the highest rewrite score is chosen; of equals the more cautious one, then the first.

    Raises ``ExperimentError`` where no setting has a rewrite score.
    """
    scored = {number: each.rewrite for number, each in enumerate(candidates) if each.rewrite is not None}
    if not scored:
        raise ExperimentError("no setting has a rewrite score: all edits failed, or nothing was left to gain")

    def bolder(number: int) -> tuple[float, ...]:
        return tuple(-part for part in candidates[number].caution)

    admissible = [number for number, rewrite in scored.items() if rewrite <= most]
    if not admissible:
        lowest = min(scored, key=lambda number: (scored[number], bolder(number)))
        return TunedChoice(lowest, f"every setting has a rewrite score above {most:g}; the lowest is taken")
    losses = dict(zip(admissible, _losses([candidates[number] for number in admissible]), strict=True))
    kept = [number for number in admissible if losses[number] <= give_up + ROUNDING]
    if kept:
        return TunedChoice(min(kept, key=lambda number: (-scored[number], bolder(number))))
    least = min(admissible, key=lambda number: (losses[number], -scored[number], bolder(number)))
    return TunedChoice(
        least,
        f"every setting gives up more than {give_up:g} of the best paraphrase or neighbourhood score; the one that "
        f"gives up the least, {losses[least]:.3f}, is taken",
    )


def _losses(candidates: Sequence[Candidate]) -> list[float]:
    """How far each is below the best in the score, paraphrase or neighbourhood, in which it is further."""
    losses = [0.0] * len(candidates)
    for scores in ([each.paraphrase for each in candidates], [each.neighborhood for each in candidates]):
        best = max((score for score in scores if score is not None), default=0.0)
        losses = [
            max(loss, best - (best if score is None else score)) for loss, score in zip(losses, scores, strict=True)
        ]
    return losses
