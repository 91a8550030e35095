"""``Tracer``: the localization methods on many facts, with every layer and window in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, Unpack

import pyarrow as pa
import torch

from causalcone.engine.compute import Compute
from causalcone.engine.errors import ExperimentError
from causalcone.engine.facts import Fact, OnError, Skipped, SkippedFacts
from causalcone.engine.localize.gradients import GradientRun
from causalcone.engine.localize.options import (
    DEFAULT_SIGMA,
    DEFAULT_STATES,
    GradientOptions,
    GradientSpec,
    Progress,
    Target,
    Tokens,
    TraceOptions,
    TraceSpec,
    ZeroSpec,
    as_tokens,
)
from causalcone.engine.localize.patching import Patching, Prompt, PromptResult, Read, Runs, as_runs
from causalcone.engine.localize.states import KINDS, States, as_states
from causalcone.engine.localize.trace_run import TracePlan, TraceRun
from causalcone.engine.noise import SCALED_NOISES, Noise, NoiseStream, parse_sigma
from causalcone.engine.run.loading import Weights, open_session
from causalcone.engine.run.session import Session
from causalcone.engine.schemas import GRADIENT_SCHEMA, TRACE_SCHEMA


class Tracer:
    """Localizes facts in a transformers model, which is read and never changed.

    model: a causal language model of a supported architecture; tokenizer: its fast tokenizer (offsets are needed).
    dtype: what to compute in, the model's own by default; device: where, the model's own by default.
    memory: bytes (or a text such as ``"4GiB"``) that a pass may take, half of what is free by default.
    kernels: ``"torch"``, ``"triton"`` or ``"flash"`` (attention with flash-attn, in bfloat16 or float16) forces what
    passes without gradient compute with; by default Triton on CUDA devices and torch elsewhere, and in float64 always
    torch. The variable CAUSALCONE_KERNELS says the same for all tracers, CAUSALCONE_ATTENTION for attention alone.
    tf32: multiply float32 rows with weights in TF32 on CUDA devices, faster and with 10 bits of mantissa; else in full
    float32, whatever torch is set to.
    Raises ``ModelError`` for models whose parameters cannot be read directly, and ``ExperimentError`` for kernels that
    cannot be used here.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        memory: int | str | None = None,
        kernels: str | None = None,
        tf32: bool = False,
    ) -> None:
        self.session = Session(model, tokenizer, Compute.of(dtype, device, memory, kernels, tf32))

    @classmethod
    def on(cls, session: Session) -> Tracer:
        """A tracer on a session, which others may share."""
        tracer = cls.__new__(cls)
        tracer.session = session
        return tracer

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        memory: int | str | None = None,
        weights: Weights = "resident",
        kernels: str | None = None,
        tf32: bool = False,
    ) -> Tracer:
        """A tracer for a model folder or hub id; its weights are kept in ``dtype``, as saved by default.

        weights: ``"resident"`` keeps them on the device; ``"stream"`` reads them from the model's safetensors files
        layer by layer, anew in every pass, for models that are larger than the device. Two layers count as part of
        ``memory`` then, and integrated gradients are refused.
        """
        return cls.on(open_session(path, Compute.of(dtype, device, memory, kernels, tf32), weights))

    @property
    def dtype(self) -> torch.dtype:
        """What passes compute in."""
        return self.session.dtype

    @property
    def device(self) -> torch.device:
        """Where passes compute."""
        return self.session.device

    def trace(
        self,
        facts: Iterable[Fact],
        states: States = DEFAULT_STATES,
        *,
        on_error: OnError = "raise",
        progress: Progress | None = None,
        **options: Unpack[TraceOptions],
    ) -> pa.Table:
        """Causal tracing (Meng et al. 2022; METHODS 3): the probability of each fact's target when its subject is
        corrupted and one window of layers is restored to its clean value at one token, for every state, centre layer
        and token.

        states: (kind, window) pairs; kind is hidden, mlp, attn, head.N (one head before the output projection) or heads
        (each of them). on_error: ``"skip"`` leaves out facts that cannot be traced and warns ``SkippedFacts``.
        progress: called with the number of facts done and of all facts. options (``TraceSpec`` says more): samples=10,
        sigma="3sd", seed=1, target="label", tokens="all", joint=False, noise=None, extra_tokens=0, sever=None,
        compat=None.

        Returns a table with the columns of ``TRACE_SCHEMA``, whole facts in their order. All facts are checked before
        anything is computed. Raises ``FactError``, ``ExperimentError``, ``ModelError`` or ``MemoryBudgetError``, each
        naming the item and the mend.
        """
        batches = self.stream(facts, states, on_error=on_error, progress=progress, **options)
        return pa.Table.from_batches(list(batches), schema=TRACE_SCHEMA)

    def stream(
        self,
        facts: Iterable[Fact],
        states: States = DEFAULT_STATES,
        *,
        on_error: OnError = "raise",
        progress: Progress | None = None,
        **options: Unpack[TraceOptions],
    ) -> Iterator[pa.RecordBatch]:
        """``trace`` as one batch per fact, handed out as passes finish; arguments are checked by the call itself."""
        return _told(self._tracing(facts, states, on_error, options)).batches(progress)

    def plan(
        self,
        facts: Iterable[Fact],
        states: States = DEFAULT_STATES,
        *,
        on_error: OnError = "raise",
        **options: Unpack[TraceOptions],
    ) -> TracePlan:
        """What ``trace`` with these arguments would compute; nothing is computed."""
        return _told(self._tracing(facts, states, on_error, options)).plan()

    def zero(
        self,
        facts: Iterable[Fact],
        states: States = (("mlp", 5),),
        *,
        target: Target = "label",
        tokens: Tokens = "subject",
        on_error: OnError = "raise",
        progress: Progress | None = None,
    ) -> pa.Table:
        """Representation zeroing (Hase et al. 2023; METHODS 3): the probability of each fact's target in the clean run
        with the values of a window set to zero at all of the chosen tokens, for every state and centre layer.

        Arguments as for ``trace``. Returns a table with the columns of ``TRACE_SCHEMA``, in which ``token`` and
        ``p_corrupted`` are null.
        """
        batches = self.stream_zero(facts, states, target=target, tokens=tokens, on_error=on_error, progress=progress)
        return pa.Table.from_batches(list(batches), schema=TRACE_SCHEMA)

    def stream_zero(
        self,
        facts: Iterable[Fact],
        states: States = (("mlp", 5),),
        *,
        target: Target = "label",
        tokens: Tokens = "subject",
        on_error: OnError = "raise",
        progress: Progress | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """``zero`` as one batch per fact, handed out as passes finish."""
        spec = ZeroSpec(states=as_states(states), target=target, tokens=as_tokens(tokens))
        return _told(TraceRun.zeroing(self.session, list(facts), spec, on_error)).batches(progress)

    def integrated_gradients(
        self,
        facts: Iterable[Fact],
        kinds: Sequence[str] = KINDS,
        *,
        on_error: OnError = "raise",
        progress: Progress | None = None,
        **options: Unpack[GradientOptions],
    ) -> pa.Table:
        """Integrated gradients (Meng et al. 2022, Fig. 16; METHODS 3) of the target's probability by every state, along
        the straight line from a baseline to its clean value.

        kinds: of hidden, mlp, attn. options (``GradientSpec`` says more): steps=50, baseline="zero", target="argmax",
        tokens="all"; samples=10, sigma="3sd" and seed=1 of the baseline ``"corrupted"``. The rest as for ``trace``.

        Returns a table with the columns of ``GRADIENT_SCHEMA``: the attribution's L2 norm, its total, and its gap: the
        total minus the change in p that it should add up to.
        """
        batches = self.stream_integrated_gradients(facts, kinds, on_error=on_error, progress=progress, **options)
        return pa.Table.from_batches(list(batches), schema=GRADIENT_SCHEMA)

    def stream_integrated_gradients(
        self,
        facts: Iterable[Fact],
        kinds: Sequence[str] = KINDS,
        *,
        on_error: OnError = "raise",
        progress: Progress | None = None,
        **options: Unpack[GradientOptions],
    ) -> Iterator[pa.RecordBatch]:
        """``integrated_gradients`` as one batch per fact, handed out as they finish."""
        spec = GradientSpec.of(kinds, **options)
        return _told(GradientRun.of(self.session, list(facts), spec, on_error)).batches(progress)

    def run(
        self,
        prompts: Sequence[Prompt | Fact | str],
        interventions: Runs,
        read: Sequence[Read] = (),
        *,
        base: str = "clean",
        samples: int = 10,
        sigma: float | str = DEFAULT_SIGMA,
        seed: int = 1,
        noise: Noise | str | None = None,
    ) -> list[PromptResult]:
        """Interventions of your own: what all localization methods are made of.

        interventions: those of one run, or a list of such lists, one per run; every run starts from the base run
        ``base`` (``"clean"``, ``"corrupted"`` of facts, or ``"other"``) of every prompt, and all go through the layers
        in one pass. read: what to hand out besides the target's probability. samples, sigma, seed, noise: of the
        corrupted run, where there is one.

        Returns a ``PromptResult`` per prompt. Raises ``ExperimentError`` or ``FactError`` naming what makes no sense.
        """
        session = self.session
        if isinstance(prompts, str | Prompt | Fact):
            raise ExperimentError("prompts are a list; give [prompt] for a single one")
        items = list(prompts)
        spec = TraceSpec.of((("hidden", 1),), samples=samples, sigma=sigma, seed=seed, noise=noise).resolved(session)
        patching = Patching(as_runs(interventions), tuple(read), base, spec.corruption, session.sizes, len(items))
        encoded = [patching.encode(prompt, number, session.tokenizer) for number, prompt in enumerate(items)]
        trials = [patching.trial(prompt, number) for number, prompt in enumerate(encoded)]
        stream = None
        if patching.corrupts:
            scaled = encoded and spec.corruption.kind in SCALED_NOISES
            level = session.noise_level(sigma, [each.own.fact for each in encoded]) if scaled else 0.0
            stream = NoiseStream(spec.corruption, level, seed, samples, session.sizes.hidden)
        results = session.run(trials, samples if stream else 1, stream)
        return [patching.result(encoded[i], trials[i], result) for i, result in results]

    def noise_level(
        self, facts: Iterable[Fact], sigma: float | str = DEFAULT_SIGMA, on_error: OnError = "raise"
    ) -> float:
        """The noise level as a number; ``"<k>sd"`` is k standard deviations of these facts' subject embeddings.

        With ``on_error="skip"``, of those facts among them that can be traced.
        """
        if not parse_sigma(sigma)[1]:
            return self.session.noise_level(sigma, ())
        encoded, skipped = self.session.encode(list(facts), "label", on_error)
        _warn(skipped)
        return self.session.noise_level(sigma, [each.fact for each in encoded])

    def embedding_noise(self, texts: Iterable[str], dof: float | None = None, replace: bool = False) -> Noise:
        """Multivariate noise, or t noise with ``dof``, with mean and covariance of the token-embedding outputs over
        running text (METHODS 2)."""
        return self.session.embedding_noise(texts, dof, replace)

    def _tracing(self, facts: Iterable[Fact], states: States, on_error: OnError, options: TraceOptions) -> TraceRun:
        return TraceRun.tracing(self.session, list(facts), TraceSpec.of(states, **options), on_error)


Run = TypeVar("Run", TraceRun, GradientRun)


def _told(run: Run) -> Run:
    """The run, once it is said which facts it leaves out."""
    _warn(run.skipped)
    return run


def _warn(skipped: Sequence[Skipped]) -> None:
    if skipped:
        warnings.warn(SkippedFacts([each.reason for each in skipped]), stacklevel=4)
