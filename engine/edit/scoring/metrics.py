"""Metrics of single edits: perplexity of essence texts, and Meng et al.'s scores and accuracies (docs/editing.md,
"Scores")."""

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
    Answer,
    ProbeSet,
)
from causalcone.engine.edit.scoring.scoring import ProbeResults, Scored

Values = tuple[float, float | None]
"""A metric before and after an edit; None where the edit failed."""

Row = tuple[str, str, float, float | None]
"""Edit, metric, and its values."""

_NAMES = {REWRITE: "efficacy", PARAPHRASE: "paraphrase", NEIGHBORHOOD: "neighborhood"}


def metrics_of(scored: Scored, accuracy: bool) -> Iterator[Row]:
    """All metrics that the probes give, none where unedited results are not finite; accuracy: as ``EditScorer``'s."""
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
    probes = enumerate(scored.probes.probes)
    texts = [(number, 1 + len(probe.tokens)) for number, probe in probes if probe.kind == ESSENCE]
    if not texts:
        return {}
    numbers, lengths = np.array(texts).T

    def mean(results: ProbeResults) -> float:
        return float(np.exp(-results.log_p[numbers] / lengths).mean())

    return {"perplexity": _before_and_after(scored, mean)}


def _success(scored: Scored, kind: str) -> Iterator[tuple[str, Values]]:
    """Score and magnitude: how often, and by how much, the new target is more likely than the true one (for neighbours
    the reverse); p is the geometric mean over the target's tokens."""
    pairs = _pairs(scored.probes, kind)
    if not pairs:
        return
    new, true = np.array(pairs).T
    if kind == NEIGHBORHOOD:
        new, true = true, new
    counts = np.array([len(probe.tokens) for probe in scored.probes.probes])

    def differences(results: ProbeResults) -> np.ndarray:
        p = np.exp(results.log_p / counts)
        return p[new] - p[true]

    yield f"{_NAMES[kind]}_score", _before_and_after(scored, lambda results: float((differences(results) > 0).mean()))
    yield f"{_NAMES[kind]}_magnitude", _before_and_after(scored, lambda results: float(differences(results).mean()))


def _numbers(probes: ProbeSet, kind: str) -> dict[tuple[int, Answer], int]:
    """The numbers of the probes of a kind, by prompt and answer."""
    return {(probe.index, probe.answer): n for n, probe in enumerate(probes.probes) if probe.kind == kind}


def _pairs(probes: ProbeSet, kind: str) -> list[tuple[int, int]]:
    """For each prompt of a kind, the probes of the new target and of the true one."""
    numbers = _numbers(probes, kind)
    targets: tuple[Answer, Answer] = (TARGET, OTHER)
    new, true = targets if probes.request.trains_new else targets[::-1]
    prompts = [index for index, answer in numbers if answer == new and (index, true) in numbers]
    return [(numbers[index, new], numbers[index, true]) for index in prompts]


def _accuracies(scored: Scored) -> Iterator[tuple[str, Values]]:
    """The share of the target's tokens (a neighbour's own answer's, if any) that are the most likely ones."""
    for kind in _NAMES:
        numbers = _numbers(scored.probes, kind)
        read = [numbers.get((index, OWN), number) for (index, answer), number in numbers.items() if answer == TARGET]
        if read:
            yield f"{kind}_accuracy", _before_and_after(scored, partial(_mean_right, numbers=read))


def _mean_right(results: ProbeResults, numbers: list[int]) -> float:
    return float(results.right[numbers].mean())


def _before_and_after(scored: Scored, metric: Callable[[ProbeResults], float]) -> Values:
    return metric(scored.pre), None if scored.post is None else metric(scored.post)
