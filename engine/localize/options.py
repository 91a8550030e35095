"""The checked options of the localization methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from causalcone.engine.errors import ExperimentError
from causalcone.engine.localize.branches import SEVERED, check_tokens
from causalcone.engine.localize.states import State, check_kinds
from causalcone.engine.noise import SCALED_NOISES, Noise, parse_sigma

DEFAULT_STATES = (("hidden", 1), ("mlp", 10), ("attn", 10))
DEFAULT_SIGMA = "3sd"
BASELINES = ("zero", "corrupted")

Progress = Callable[[int, int], None]
Tokens = str | Sequence[int]
Chosen = str | tuple[int, ...]


class TraceOptions(TypedDict, total=False):
    """Options of ``Tracer.trace``, ``stream`` and ``plan`` besides facts and states; ``TraceSpec`` says what they mean
    and what they are by default."""

    samples: int
    sigma: float | str
    seed: int
    target: str
    tokens: Tokens
    joint: bool
    noise: Noise | str | None
    extra_tokens: int
    sever: str | None
    compat: str | None


@dataclass(frozen=True)
class TraceSpec:
    """A causal trace.

    states: what is restored. samples: noise samples to average over. sigma: noise level, a number or ``"<k>sd"`` for k
    standard deviations of the facts' subject embeddings. seed: of the noise. target: ``"label"`` (product over all
    tokens of ``target_true``) or ``"argmax"`` (the clean run's most likely token). tokens: ``"all"``,
    ``"subject_onward"``, ``"subject"``, ``"subject_last"``, ``"last"`` or indices. joint: restore the chosen tokens
    together, not one by one. noise: a ``Noise``, or the name of one that needs no more; Gaussian by default; with a
    counterfactual prompt there is one corrupted run, and samples, sigma and seed have no part in it.
    extra_tokens: how many tokens behind the subject are corrupted too. sever: hold the token's ``"mlp"``, ``"attn"`` or
    ``"both"`` at their corrupted values (with hidden states). compat: ``"published"`` draws the noise of severed runs,
    and takes p_corrupted of replacing noise, as the published code does.
    """

    states: tuple[State, ...]
    samples: int = 10
    sigma: float | str = DEFAULT_SIGMA
    seed: int = 1
    target: str = "label"
    tokens: Tokens = "all"
    joint: bool = False
    noise: Noise | str | None = None
    extra_tokens: int = 0
    sever: str | None = None
    compat: str | None = None

    def __post_init__(self) -> None:
        check_count("samples", self.samples, "noise samples")
        check_seed(self.seed)
        check_target(self.target)
        parse_sigma(self.sigma)
        if not isinstance(self.noise, Noise):
            object.__setattr__(self, "noise", Noise(self.noise or "gaussian"))
        check_tokens(self.tokens)
        noise = self.corruption
        if noise.kind not in SCALED_NOISES and self.sigma != DEFAULT_SIGMA:
            raise ExperimentError(f"sigma has no meaning with {noise.kind} noise, which has a size of its own; drop it")
        if isinstance(self.extra_tokens, bool) or not isinstance(self.extra_tokens, int) or self.extra_tokens < 0:
            raise ExperimentError(f"extra_tokens is {self.extra_tokens!r}; give a whole number of tokens from 0 up")
        if self.extra_tokens and noise.kind == "counterfactual":
            raise ExperimentError("a counterfactual prompt has no noise for extra tokens; drop extra_tokens")
        if self.sever not in SEVERED:
            raise ExperimentError(f"cannot sever {self.sever!r}; choose mlp, attn or both")
        other = next((state for state in self.states if state.kind != "hidden"), None)
        if self.sever and other:
            raise ExperimentError(f"severed tracing restores hidden states only, not {other}; leave that state out")
        if self.compat not in (None, "published"):
            raise ExperimentError(f"unknown compat {self.compat!r}; the only one is 'published'")
        if self.compat and self.sever and noise.kind == "counterfactual":
            raise ExperimentError("the published code has no counterfactual prompts; drop compat or the noise")

    @property
    def corruption(self) -> Noise:
        """The noise, when all is checked."""
        assert isinstance(self.noise, Noise)
        return self.noise

    @property
    def chosen(self) -> Chosen:
        """The tokens, when all is checked."""
        return check_tokens(self.tokens)

    @property
    def method(self) -> str:
        """The name of the method in tables."""
        return f"sever_{self.sever}" if self.sever else "restore"


class GradientOptions(TypedDict, total=False):
    """Options of ``Tracer.integrated_gradients`` besides facts and kinds; ``GradientSpec`` says what they mean and what
    they are by default."""

    steps: int
    baseline: str
    target: str
    tokens: Tokens
    samples: int
    sigma: float | str
    seed: int


@dataclass(frozen=True)
class GradientSpec:
    """Integrated gradients.

    kinds: of which states. steps: points of Gauss-Legendre quadrature. baseline: ``"zero"``, or ``"corrupted"``: the
    state in the corrupted run, averaged over its ``samples`` (with ``sigma`` and ``seed`` as for tracing). For hidden
    states a zero baseline makes the path nearly a step, since the norm that follows undoes any scale: the gap is large.
    target: ``"argmax"`` or ``"label"``, and tokens: as for tracing.
    """

    kinds: Sequence[str]
    steps: int = 50
    baseline: str = "zero"
    target: str = "argmax"
    tokens: Tokens = "all"
    samples: int = 10
    sigma: float | str = DEFAULT_SIGMA
    seed: int = 1

    def __post_init__(self) -> None:
        check_kinds(self.kinds)
        check_count("steps", self.steps, "quadrature points")
        check_count("samples", self.samples, "noise samples")
        check_seed(self.seed)
        check_target(self.target)
        parse_sigma(self.sigma)
        check_tokens(self.tokens)
        if self.baseline not in BASELINES:
            raise ExperimentError(f"unknown baseline {self.baseline!r}; choose from {', '.join(BASELINES)}")

    @property
    def chosen(self) -> Chosen:
        """The tokens, when all is checked."""
        return check_tokens(self.tokens)


def check_count(name: str, value: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ExperimentError(f"{name} is {value!r}; give a whole number of {what} from 1 up")


def check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ExperimentError(f"seed is {seed!r}; give a whole number from 0 to 2**32 - 1")


def check_target(target: str) -> None:
    if target not in ("label", "argmax"):
        raise ExperimentError(f"unknown target {target!r}; choose 'label' or 'argmax'")


def check_on_error(on_error: str) -> None:
    if on_error not in ("raise", "skip"):
        raise ExperimentError(f"on_error is {on_error!r}; choose 'raise' or 'skip'")
