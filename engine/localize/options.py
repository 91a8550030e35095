"""The checked options of the localization methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypedDict, get_args

from causalcone.engine.errors import ExperimentError, one_of
from causalcone.engine.localize.states import State, States, as_states, check_kinds, states_in
from causalcone.engine.noise import SCALED_NOISES, Noise, NoiseKind, TextNoise, parse_sigma
from causalcone.engine.run.session import Session

DEFAULT_STATES = (("hidden", 1), ("mlp", 10), ("attn", 10))
DEFAULT_SIGMA = "3sd"
TOKEN_CHOICES = ("all", "subject_onward", "subject", "subject_last", "last")
SEVERED = {None: (), "mlp": ("mlp",), "attn": ("attn",), "both": ("mlp", "attn")}
"""By what is severed, the sites that are held at their corrupted values."""

Target = Literal["label", "argmax"]
Sever = Literal["mlp", "attn", "both"]
Compat = Literal["published"]
Baseline = Literal["zero", "corrupted"]
Progress = Callable[[int, int], None]
Tokens = str | Sequence[int]
Chosen = str | tuple[int, ...]


class TraceOptions(TypedDict, total=False):
    """Options of ``Tracer.trace``, ``stream`` and ``plan``, whose meanings and defaults are those of ``TraceSpec``."""

    samples: int
    sigma: float | str
    seed: int
    target: Target
    tokens: Tokens
    joint: bool
    noise: Noise | NoiseKind | None
    extra_tokens: int
    sever: Sever | None
    compat: Compat | None


class CheckedSpec:
    """What the specs of all methods share: checks, and what to keep of them beside results."""

    target: Target
    tokens: Chosen

    def __post_init__(self) -> None:
        one_of("target", self.target, get_args(Target))
        check_tokens(self.tokens)

    @property
    def configuration(self) -> dict[str, Any]:
        """What to keep of it beside results."""
        states = {"states": [str(state) for state in self.states]} if isinstance(self, TraceSpec | ZeroSpec) else {}
        return {**vars(self), **states}


@dataclass(frozen=True, kw_only=True)
class TraceSpec(CheckedSpec):
    """A causal trace. states: what is restored. samples: noise samples to average over. sigma: noise level, a number or
    ``"<k>sd"`` for k standard deviations of the facts' subject embeddings. seed: of the noise. target: ``"label"``
    (product over all tokens of ``target_true``) or ``"argmax"`` (the clean run's most likely token). tokens: ``"all"``,
    ``"subject_onward"``, ``"subject"``, ``"subject_last"``, ``"last"`` or indices. joint: restore the chosen tokens
    together, not one by one. noise: with a counterfactual prompt there is one corrupted run, and samples, sigma and
    seed have no part in it. extra_tokens: how many tokens after the subject are corrupted too. sever: hold the token's
    ``"mlp"``, ``"attn"`` or ``"both"`` at their corrupted values (with hidden states). compat: ``"published"`` draws
    the noise of severed runs, and takes p_corrupted of replacing noise, as the published code does."""

    states: tuple[State, ...]
    samples: int = 10
    sigma: float | str = DEFAULT_SIGMA
    seed: int = 1
    target: Target = "label"
    tokens: Chosen = "all"
    joint: bool = False
    noise: Noise | TextNoise = field(default_factory=Noise)
    extra_tokens: int = 0
    sever: Sever | None = None
    compat: Compat | None = None

    @classmethod
    def of(
        cls, states: States, noise: Noise | NoiseKind | None = None, tokens: Tokens = "all", **options: Any
    ) -> TraceSpec:
        corruption = noise if isinstance(noise, Noise) else Noise(noise or "gaussian")
        return cls(states=as_states(states), noise=corruption, tokens=as_tokens(tokens), **options)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sampling(self)
        kind = self.noise.kind
        if kind not in SCALED_NOISES and self.sigma != DEFAULT_SIGMA:
            raise ExperimentError(f"sigma has no meaning with {kind} noise, which has a size of its own; drop it")
        if isinstance(self.extra_tokens, bool) or not isinstance(self.extra_tokens, int) or self.extra_tokens < 0:
            raise ExperimentError(f"extra_tokens is {self.extra_tokens!r}; give a whole number of tokens from 0 up")
        if self.extra_tokens and kind == "counterfactual":
            raise ExperimentError("a counterfactual prompt has no noise for extra tokens; drop extra_tokens")
        one_of("sever", self.sever, SEVERED)
        other = next((state for state in self.states if state.kind != "hidden"), None)
        if self.sever and other:
            raise ExperimentError(f"severed tracing restores hidden states only, not {other}; leave that state out")
        one_of("compat", self.compat, (None, *get_args(Compat)))
        if self.compat and self.sever and kind == "counterfactual":
            raise ExperimentError("the published code has no counterfactual prompts; drop compat or the noise")

    @property
    def corruption(self) -> Noise:
        """The noise, in a resolved trace."""
        assert isinstance(self.noise, Noise)
        return self.noise

    @property
    def method(self) -> str:
        return f"sever_{self.sever}" if self.sever else "restore"

    @property
    def configuration(self) -> dict[str, Any]:
        return {**super().configuration, "noise": self.noise.kind}

    def resolved(self, session: Session) -> TraceSpec:
        """The same with the states, and the noise, of a session's model; the level of noise is not resolved yet."""
        noise = self.noise
        if isinstance(noise, TextNoise):
            noise = session.embedding_noise(noise.texts, noise.dof, noise.replace)
        if noise.mean is not None and len(noise.mean) != session.sizes.hidden:
            raise ExperimentError(f"the noise has {len(noise.mean)} dimensions, the embeddings {session.sizes.hidden}")
        return replace(self, states=states_in(self.states, session.sizes.heads), noise=noise)


@dataclass(frozen=True, kw_only=True)
class ZeroSpec(CheckedSpec):
    """Zeroing of states at the chosen tokens together; target and tokens as for tracing."""

    states: tuple[State, ...]
    target: Target = "label"
    tokens: Chosen = "subject"
    method: ClassVar[str] = "zero"

    def resolved(self, session: Session) -> ZeroSpec:
        return replace(self, states=states_in(self.states, session.sizes.heads))


class GradientOptions(TypedDict, total=False):
    """Options of ``Tracer.integrated_gradients``, whose meanings and defaults are those of ``GradientSpec``."""

    steps: int
    baseline: Baseline
    target: Target
    tokens: Tokens
    samples: int
    sigma: float | str
    seed: int


@dataclass(frozen=True, kw_only=True)
class GradientSpec(CheckedSpec):
    """Integrated gradients. kinds: of which states. steps: points of Gauss-Legendre quadrature. baseline: ``"zero"``,
    or ``"corrupted"``: the state in the corrupted run, averaged over its ``samples`` (with ``sigma`` and ``seed`` as
    for tracing). For hidden states a zero baseline makes the path nearly a step, since the norm that follows undoes any
    scale: the gap is large. target: ``"argmax"`` or ``"label"``, and tokens: as for tracing."""

    kinds: tuple[str, ...]
    steps: int = 50
    baseline: Baseline = "zero"
    target: Target = "argmax"
    tokens: Chosen = "all"
    samples: int = 10
    sigma: float | str = DEFAULT_SIGMA
    seed: int = 1

    @classmethod
    def of(cls, kinds: Sequence[str], tokens: Tokens = "all", **options: Any) -> GradientSpec:
        check_kinds(kinds)
        return cls(kinds=tuple(kinds), tokens=as_tokens(tokens), **options)

    def __post_init__(self) -> None:
        check_kinds(self.kinds)
        _check_count("steps", self.steps, "quadrature points")
        super().__post_init__()
        _check_sampling(self)
        one_of("baseline", self.baseline, get_args(Baseline))


def choose_tokens(
    tokens: str | Sequence[int], prompt: int, span: tuple[int, int], fact_id: str = ""
) -> tuple[int, ...]:
    """Token positions from a choice's name or from indices (negative ones count from the prompt's end)."""
    start, end = span
    named = {
        "all": range(prompt),
        "subject_onward": range(start, prompt),
        "subject": range(start, end),
        "subject_last": (end - 1,),
        "last": (prompt - 1,),
    }
    if isinstance(tokens, str):
        return tuple(named[tokens])
    for index in tokens:
        if not -prompt <= index < prompt:
            raise ExperimentError(f"fact {fact_id!r}: token {index} is outside its prompt of {prompt} tokens")
    return tuple(sorted({index % prompt for index in tokens}))


def as_tokens(tokens: str | Iterable[int]) -> Chosen:
    """A choice of tokens that can be kept."""
    return tokens if isinstance(tokens, str) else tuple(tokens)


def check_tokens(tokens: Chosen) -> None:
    """Raise ``ExperimentError`` naming what can be chosen."""
    if isinstance(tokens, str):
        if tokens not in TOKEN_CHOICES:
            raise ExperimentError(f"unknown tokens {tokens!r}; choose from {', '.join(TOKEN_CHOICES)}, or give indices")
    elif not tokens or not all(isinstance(index, int) and not isinstance(index, bool) for index in tokens):
        raise ExperimentError(f"tokens {tokens!r} are not one or more whole numbers; choose indices or {TOKEN_CHOICES}")


def _check_sampling(spec: TraceSpec | GradientSpec) -> None:
    _check_count("samples", spec.samples, "noise samples")
    if isinstance(spec.seed, bool) or not isinstance(spec.seed, int) or not 0 <= spec.seed < 2**32:
        raise ExperimentError(f"seed is {spec.seed!r}; give a whole number from 0 to 2**32 - 1")
    parse_sigma(spec.sigma)


def _check_count(name: str, value: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ExperimentError(f"{name} is {value!r}; give a whole number of {what} from 1 up")
