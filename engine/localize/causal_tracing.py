"""Causal tracing and zeroing as experiments: what runs for each fact, and the table that comes of it
(docs/methods.md, "Localization")."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from causalcone.engine.encoding import EncodedFact, PromptEncoder
from causalcone.engine.errors import FactError
from causalcone.engine.facts import Fact
from causalcone.engine.localize.options import SEVERED, TraceSpec, ZeroSpec, choose_tokens
from causalcone.engine.localize.states import State
from causalcone.engine.plan.cone import Shape
from causalcone.engine.plan.interventions import CLEAN, CORRUPTED, SITES, ZERO, Base, Experiment, Overwrites
from causalcone.engine.run.runner import Trial

TOGETHER = -1
"""The token of a table row that is about all chosen tokens together."""


@dataclass(frozen=True, eq=False)
class TraceGrid:
    """The experiment on one shape, and its table: what each row is about (``state``, an index; centre ``layer``;
    ``token``), and the ``run`` that shows it; all (rows,)."""

    experiment: Experiment
    state: np.ndarray
    layer: np.ndarray
    token: np.ndarray
    run: np.ndarray


def target_tokens(fact: EncodedFact) -> tuple[int, ...]:
    """The tokens that predict the target's."""
    return tuple(range(len(fact.prompt) - 1, len(fact.tokens)))


def own_trial(
    fact: EncodedFact, experiment: Experiment, span: tuple[int, int] = (0, 0), vectors: tuple[Tensor, ...] = ()
) -> Trial:
    """An experiment on the fact's own prompt, after which its target is read; span: the corrupted tokens."""
    shape = Shape(len(fact.tokens), span, (target_tokens(fact),))
    return Trial(fact.fact.id, (fact.tokens,), fact.target, shape, experiment, vectors)


def counterfactual_prompt(fact: EncodedFact, prompts: PromptEncoder) -> tuple[int, ...]:
    """Token ids of the fact's prompt about its ``counterfactual_subject``, which must be as many."""
    name, subject = fact.fact.id, fact.fact.counterfactual_subject
    if subject is None:
        raise FactError(
            f"fact {name!r} has no counterfactual_subject, and none was found of its relation; "
            "give one of as many tokens, or corrupt by noise"
        )
    other = prompts.fact(replace(fact.fact, subject=subject), "argmax").prompt
    if len(other) != len(fact.prompt):
        raise FactError(
            f"fact {name!r}: the prompt has {len(other)} tokens with the counterfactual subject {subject!r} and "
            f"{len(fact.prompt)} with its own; choose a subject of as many tokens"
        )
    if other == fact.prompt:
        raise FactError(f"fact {name!r}: the counterfactual subject {subject!r} gives the same prompt; choose another")
    return other


def with_counterfactual_subjects(facts: Sequence[Fact], prompts: PromptEncoder) -> list[Fact]:
    """The facts, with a ``counterfactual_subject`` where that was left open and the others have one: the subject of the
    next fact with the same ``relation_id`` and another answer whose prompt has as many tokens."""
    related = defaultdict(list)
    for fact in facts:
        related[fact.relation_id].append(fact)

    def size(fact: Fact, subject: str) -> int | None:
        try:
            return len(prompts.prompt(fact.prompt.replace("{}", subject), joiner=fact.joiner, name=fact.id).tokens)
        except FactError:  # which encoding the fact gives, if it is of its own subject
            return None

    def completed(fact: Fact) -> Fact:
        if fact.counterfactual_subject is not None or fact.relation_id is None:
            return fact
        others, length = related[fact.relation_id], size(fact, fact.subject)
        start = next(number for number, other in enumerate(others) if other is fact)
        turned = (other for other in others[start + 1 :] + others[:start] if other.target_true != fact.target_true)
        found = next((other.subject for other in turned if length and size(fact, other.subject) == length), None)
        return replace(fact, counterfactual_subject=found)

    return [completed(fact) for fact in facts]


@dataclass
class CausalTracing:
    """Causal tracing as ``spec`` says, in a model of ``depth`` layers; facts of one shape share their grid."""

    spec: TraceSpec
    depth: int
    _grids: dict[tuple, TraceGrid] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return 1 if self.spec.corruption.kind == "counterfactual" else self.spec.samples

    @property
    def bases(self) -> tuple[Base, ...]:
        """The clean run, the corrupted one, and where the published code corrupts restored runs otherwise, that one."""
        noise, published = self.spec.corruption, self.spec.compat == "published"
        if noise.kind == "counterfactual":
            return Base(), Base(prompt=1)
        second = Base(draw=int(bool(self.spec.sever)), replace=noise.replace)
        first = Base(draw=0, replace=noise.replace and not published)
        return (Base(), first, second) if published and first != second else (Base(), first)

    @property
    def draws(self) -> int:
        return 1 + max(base.draw or 0 for base in self.bases)

    def trial(self, fact: EncodedFact) -> tuple[Trial, TraceGrid]:
        spec, read = self.spec, target_tokens(fact)
        span = fact.span[0], min(fact.span[1] + spec.extra_tokens, len(fact.prompt))
        first_corrupted = span[0]
        texts: tuple[tuple[int, ...], ...] = (fact.tokens,)
        alike: tuple[tuple[bool, ...], ...] = ()
        if fact.counterfactual is not None:
            other = fact.counterfactual + fact.target[:-1]
            same = tuple(token == changed for token, changed in zip(fact.tokens, other, strict=True))
            span, first_corrupted, texts, alike = (0, 0), same.index(False), (fact.tokens, other), (same,)
        key = (choose_tokens(spec.tokens, len(fact.prompt), fact.span), first_corrupted)
        if key not in self._grids:
            self._grids[key] = restoration_grid(
                spec.states, self.depth, first_corrupted, key[0], self.bases, spec.sever, spec.joint
            )
        shape = Shape(len(fact.tokens), span, (read,) * len(texts), alike)
        return Trial(fact.fact.id, texts, fact.target, shape, self._grids[key].experiment), self._grids[key]


@dataclass
class Zeroing:
    """Zeroing as ``spec`` says, in a model of ``depth`` layers: clean runs with one window set to zero at all chosen
    tokens, and a table row per (state, centre layer)."""

    spec: ZeroSpec
    depth: int
    samples = 1
    _grids: dict[tuple, TraceGrid] = field(default_factory=dict)

    def trial(self, fact: EncodedFact) -> tuple[Trial, TraceGrid]:
        tokens = choose_tokens(self.spec.tokens, len(fact.prompt), fact.span)
        if tokens not in self._grids:
            table, windows = _windows(self.spec.states, self.depth, tokens, tokens, 1, joint=True)
            overwrites = _overwritten(windows, 1, tokens, ZERO)
            experiment = Experiment((Base(),), np.full(len(windows), CLEAN), overwrites)
            self._grids[tokens] = TraceGrid(experiment, *table)
        return own_trial(fact, self._grids[tokens].experiment), self._grids[tokens]


def restoration_grid(
    states: Sequence[State],
    depth: int,
    first_corrupted: int,
    tokens: Sequence[int],
    bases: tuple[Base, ...],
    sever: str | None = None,
    joint: bool = False,
) -> TraceGrid:
    """Causal tracing, plain or severed: corrupted runs with one window restored to its clean values. One table row per
    (state, centre layer, token), or per (state, centre layer) where the tokens are restored jointly. Branches fork from
    the last of ``bases`` (a clean run, a corrupted one, and where the restored runs are corrupted otherwise, that one).
    Tokens before the first corrupted one show that run itself: restoring them changes nothing."""
    reached = tuple(token for token in tokens if token >= first_corrupted)
    table, windows = _windows(states, depth, tokens, reached, len(bases), joint)
    restored = _overwritten(windows, len(bases), reached, CLEAN)
    held = [restored]
    for site in SEVERED[sever]:
        # where the restored run has the same noise, nothing differs below its window
        start = restored.end if len(bases) == 2 else np.zeros_like(restored.end)
        held.append(
            Overwrites.of(np.array(SITES.index(site)), start, np.array(depth), restored.run, restored.token, CORRUPTED)
        )
    experiment = Experiment(bases, np.full(len(windows), len(bases) - 1), Overwrites.joined(*held[::-1]))
    return TraceGrid(experiment, *table)


def _windows(
    states: Sequence[State], depth: int, tokens: Sequence[int], reached: tuple[int, ...], bases: int, joint: bool
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The table's columns (state, layer, token, run), and the distinct windows (B, 5): site, head, token, start, end.
    Equal windows are one branch; rows about tokens that are not ``reached`` show the run that branches fork from."""
    about = [TOGETHER] if joint else list(tokens)
    state, layer, token = (
        axis.ravel() for axis in np.meshgrid(np.arange(len(states)), np.arange(depth), np.array(about), indexing="ij")
    )
    site = np.array([SITES.index(each.site) for each in states])[state]
    head = np.array([-1 if each.head is None else each.head for each in states])[state]
    ranges = np.array([[each.layers(centre, depth) for centre in range(depth)] for each in states])
    start, end = ranges[state, layer].T
    run = np.full(len(state), bases - 1)
    reaches = np.full(len(state), bool(reached)) if joint else np.isin(token, reached)
    # sorted by site and token first, so that a half of the branches still shares most of its windows' beginnings
    columns = np.stack([site, head, token, start, end], 1)[reaches]
    windows, branch = np.unique(columns, axis=0, return_inverse=True)
    run[reaches] = branch.ravel() + bases
    return (state, layer, token, run), windows


def _overwritten(windows: np.ndarray, bases: int, together: tuple[int, ...], source: int) -> Overwrites:
    """The windows' overwrites; those about all tokens together have one for each."""
    run = np.arange(len(windows)) + bases
    site, head, token, start, end = windows.T
    if len(windows) and token[0] == TOGETHER:
        times = len(together)
        site, head, start, end, run = (np.repeat(column, times) for column in (site, head, start, end, run))
        token = np.tile(together, len(windows))
    return Overwrites.of(site, start, end, run, token, source, head=head)
