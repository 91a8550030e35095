"""Metrics of single edits: perplexity of essence texts, and Meng et al.'s scores and accuracies (docs/editing.md,
"Scores")."""

from collections.abc import Iterator, Sequence

import numpy as np

from causalcone.engine.edit.scoring.probes import (
    ESSENCE,
    LOCALITY,
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

Row = tuple[str, str, float, float | None]
"""Edit, metric, and its values before and after the edit; None where that failed."""

_NAMES = {REWRITE: "efficacy", PARAPHRASE: "paraphrase", NEIGHBORHOOD: "neighborhood"}


def metrics_of(scored: Scored, accuracy: bool) -> Iterator[Row]:
    """All metrics that the probes give, none where unedited results are not finite; accuracy: as ``EditScorer``'s."""
    if not scored.pre.finite:
        return
    pre = _metrics(scored.probes, scored.pre, scored.pre, accuracy)
    post = {} if scored.post is None else _metrics(scored.probes, scored.post, scored.pre, accuracy)
    for name, value in pre.items():
        yield scored.edit.edit_id, name, value, post.get(name)


def _metrics(probes: ProbeSet, results: ProbeResults, before: ProbeResults, accuracy: bool) -> dict[str, float]:
    """Perplexity: the mean over texts of exp(-sum of the N - 1 log-probabilities / N).

    Score and magnitude: how often, and by how much, the new target is more likely than the true one (for neighbours
    the reverse); p is the geometric mean over the target's tokens. Accuracy: the share of the target's tokens (a
    neighbour's own answer's, if any) that are the most likely ones; by group of the fact's own probes, as ``_share``.
    """
    counts = np.array([len(probe.tokens) for probe in probes.probes])
    p = np.exp(results.log_p / counts)
    targets: tuple[Answer, Answer] = (TARGET, OTHER)
    new, true = targets if probes.request.trains_new else targets[::-1]
    metrics, accuracies = {}, {}
    if texts := [number for number, probe in enumerate(probes.probes) if probe.kind == ESSENCE]:
        metrics["perplexity"] = float(np.exp(-results.log_p[texts] / (1 + counts[texts])).mean())
    for kind, name in _NAMES.items():
        numbers = {(probe.index, probe.answer): n for n, probe in enumerate(probes.probes) if probe.kind == kind}
        if prompts := [index for index, answer in numbers if answer == new and (index, true) in numbers]:
            more, less = (true, new) if kind == NEIGHBORHOOD else (new, true)
            difference = p[[numbers[index, more] for index in prompts]] - p[[numbers[index, less] for index in prompts]]
            metrics[f"{name}_score"] = float((difference > 0).mean())
            metrics[f"{name}_magnitude"] = float(difference.mean())
        read = [numbers.get((index, OWN), number) for (index, answer), number in numbers.items() if answer == TARGET]
        if read and accuracy:
            accuracies[f"{kind}_accuracy"] = float(results.right[read].mean())
    if accuracy:
        for group, answers in probes.groups.items():
            shares = [_share(group, numbers, results, before) for numbers in answers]
            accuracies[f"{group}_accuracy"] = float(np.mean(shares))
    return metrics | accuracies


def _share(group: str, numbers: Sequence[int], results: ProbeResults, before: ProbeResults) -> float:
    """Of a probe with several accepted answers, the best one's share of tokens that are the most likely ones; of what
    is to stay, the share of most likely tokens that are what they were, in the place of the answer that was likeliest
    before the edit."""
    if group.split("/")[0] != LOCALITY:
        return float(results.right[numbers].max())
    answer = numbers[int(before.log_p[numbers].argmax())]
    return float((results.likeliest[answer] == before.likeliest[answer]).mean())
