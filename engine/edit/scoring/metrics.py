"""Metrics of single edits: perplexity of essence texts, and Meng et al.'s scores and accuracies (METHODS 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from causalcone.engine.edit.scoring.probes import (
    ESSENCE,
    NEIGHBORHOOD,
    OTHER,
    OWN,
    PARAPHRASE,
    REWRITE,
    TARGET,
    ProbeSet,
)
from causalcone.engine.edit.scoring.scoring import ProbeResults, Scored

Values = tuple[float, float | None]
"""A metric before and after an edit; None where the edit failed."""

Row = tuple[str, str, float, float | None]
"""Edit, metric, and its values."""

_NAMES = {REWRITE: "efficacy", PARAPHRASE: "paraphrase", NEIGHBORHOOD: "neighborhood"}


def metrics_of(scored: Scored, accuracy: bool) -> Iterator[Row]:
    """All metrics that the scored questions give, none where the unedited model's answers are not finite; ``accuracy``
    says whether the most likely tokens were read."""
    if not scored.pre.finite:
        return
    rows = {
        **_perplexity(scored),
        **{name: values for kind in _NAMES for name, values in _success(scored, kind)},
        **(dict(_accuracies(scored)) if accuracy else {}),
    }
    for name, (pre, post) in rows.items():
        yield scored.edit.edit_id, name, pre, post


def _perplexity(scored: Scored) -> dict[str, Values]:
    """Mean over texts of exp(-sum of the N - 1 log-probabilities / N)."""
    texts = [place for place, each in enumerate(scored.questions.asked) if each.kind == ESSENCE]
    if not texts:
        return {}
    lengths = np.array([1 + len(scored.questions.asked[place].tokens) for place in texts])

    def mean(answers: ProbeResults) -> float:
        return float(np.exp(-answers.log_p[texts] / lengths).mean())

    return {"perplexity": _before_and_after(scored, mean)}


def _success(scored: Scored, kind: str) -> Iterator[tuple[str, Values]]:
    """Score and magnitude: how often, and by how much, the new target is more likely than the true one (the other way
    round for neighbours); p is the geometric mean over the target's tokens."""
    pairs = _pairs(scored.questions, kind)
    if not pairs:
        return
    new, true = np.array(pairs).T
    if kind == NEIGHBORHOOD:
        new, true = true, new
    counts = np.array([len(each.tokens) for each in scored.questions.asked])

    def differences(answers: ProbeResults) -> np.ndarray:
        p = np.exp(answers.log_p / counts)
        return p[new] - p[true]

    yield f"{_NAMES[kind]}_score", _before_and_after(scored, lambda own: float((differences(own) > 0).mean()))
    yield f"{_NAMES[kind]}_magnitude", _before_and_after(scored, lambda own: float(differences(own).mean()))


def _pairs(questions: ProbeSet, kind: str) -> list[tuple[int, int]]:
    """For each prompt of a kind, the questions about the new target and about the true one."""
    places = {(each.index, each.answer): n for n, each in enumerate(questions.asked) if each.kind == kind}
    new, true = (TARGET, OTHER) if questions.request.trains_new else (OTHER, TARGET)
    return [
        (places[index, new], places[index, true])
        for index, answer in places
        if answer == new and (index, true) in places
    ]


def _accuracies(scored: Scored) -> Iterator[tuple[str, Values]]:
    """The share of the target's tokens that are the most likely ones, of neighbours those of their own answer where
    they have one."""
    for kind in _NAMES:
        places = {(each.index, each.answer): n for n, each in enumerate(scored.questions.asked) if each.kind == kind}
        chosen = [places.get((index, OWN), place) for (index, answer), place in places.items() if answer == TARGET]
        if chosen:
            yield f"{kind}_accuracy", _before_and_after(scored, partial(_mean_right, at=chosen))


def _mean_right(answers: ProbeResults, at: list[int]) -> float:
    return float(answers.right[at].mean())


def _before_and_after(scored: Scored, metric: Callable[[ProbeResults], float]) -> Values:
    return metric(scored.pre), None if scored.post is None else metric(scored.post)
