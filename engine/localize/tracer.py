"""``Tracer``: the localization methods on many facts, with every layer and window in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import pyarrow as pa
import torch

from causalcone.engine.compute import Compute
from causalcone.engine.errors import ExperimentError, ModelError
from causalcone.engine.facts import EncodedFact, Fact, token_texts
from causalcone.engine.localize.branches import TraceGrid, check_tokens, choose_tokens
from causalcone.engine.localize.causal_tracing import CausalTracing, Zeroing, counterfactual_prompt
from causalcone.engine.localize.gradients import IntegratedGradients
from causalcone.engine.localize.options import (
    DEFAULT_SIGMA,
    DEFAULT_STATES,
    GradientOptions,
    GradientSpec,
    Progress,
    Tokens,
    TraceOptions,
    TraceSpec,
    check_on_error,
    check_target,
)
from causalcone.engine.localize.patching import Patching, Prompt, PromptResult, Read, Runs, as_runs
from causalcone.engine.localize.states import KINDS, State, States, as_states
from causalcone.engine.localize.tables import gradient_batch, trace_batch
from causalcone.engine.noise import SCALED_NOISES, Noise, NoiseStream, parse_sigma
from causalcone.engine.plan.cost import forward_flops
from causalcone.engine.run.loading import Weights, open_session
from causalcone.engine.run.runner import Trial
from causalcone.engine.run.session import Session
from causalcone.engine.schemas import GRADIENT_SCHEMA, TRACE_SCHEMA


@dataclass(frozen=True)
class TracePlan:
    """What tracing would compute.

    flops: multiply-adds x 2 of all projections and the unembedding, as executed; attention_flops: of attention
    products; naive_flops: what published code spends on the same table (for each state, layer and token one forward
    of 1 + samples sequences with all logits, two where it is severed); rows: rows of all layers' outputs; peak_bytes:
    predicted peak of a pass; read_bytes: bytes of weights that each pass reads from files, where they are streamed.
    """

    facts: int
    passes: int
    rows: int
    flops: int
    attention_flops: int
    naive_flops: int
    peak_bytes: int
    read_bytes: int = 0


@dataclass(frozen=True)
class _TraceRun:
    """Facts with what runs for each, with how many samples of which noise, and how results become a table."""

    facts: list[EncodedFact]
    trials: list[Trial]
    grids: list[TraceGrid]
    states: tuple[State, ...]
    method: str
    samples: int = 1
    noise: NoiseStream | None = None


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
        on_error: str = "raise",
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
        on_error: str = "raise",
        progress: Progress | None = None,
        **options: Unpack[TraceOptions],
    ) -> Iterator[pa.RecordBatch]:
        """``trace`` as one batch per fact, handed out as passes finish; arguments are checked by the call itself."""
        return self._batches(self._tracing(facts, states, on_error, options), progress)

    def plan(
        self,
        facts: Iterable[Fact],
        states: States = DEFAULT_STATES,
        *,
        on_error: str = "raise",
        **options: Unpack[TraceOptions],
    ) -> TracePlan:
        """What ``trace`` with these arguments would compute; nothing is computed."""
        study = self._tracing(facts, states, on_error, options)
        passes = peak = rows = flops = attention_flops = 0
        for bytes_needed, costs in self.session.costs(study.trials, study.samples, study.noise):
            passes += 1
            peak = max(peak, bytes_needed)
            rows += sum(own.rows for own in costs)
            flops += sum(own.flops for own in costs)
            attention_flops += sum(own.attention_flops for own in costs)
        forwards = 2 if study.method != "restore" else 1
        naive = sum(
            (1 + study.samples) * (1 + forwards * len(grid.run)) * forward_flops(self.session.sizes, len(fact.tokens))
            for fact, grid in zip(study.facts, study.grids, strict=True)
        )
        read = self.session.architecture.read_bytes
        return TracePlan(len(study.facts), passes, rows, flops, attention_flops, naive, peak, read)

    def zero(
        self,
        facts: Iterable[Fact],
        states: States = (("mlp", 5),),
        *,
        target: str = "label",
        tokens: Tokens = "subject",
        on_error: str = "raise",
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
        target: str = "label",
        tokens: Tokens = "subject",
        on_error: str = "raise",
        progress: Progress | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """``zero`` as one batch per fact, handed out as passes finish."""
        check_target(target)
        check_on_error(on_error)
        parsed, chosen = as_states(states, self.session.sizes.heads), check_tokens(tokens)
        encoded = self._encode(facts, target, chosen, on_error)
        zeroing = Zeroing(parsed, chosen, self.session.sizes.depth)
        pairs = [zeroing.case(fact) for fact in encoded]
        trials, grids = [trial for trial, _ in pairs], [grid for _, grid in pairs]
        return self._batches(_TraceRun(encoded, trials, grids, parsed, "zero"), progress)

    def integrated_gradients(
        self,
        facts: Iterable[Fact],
        kinds: Sequence[str] = KINDS,
        *,
        on_error: str = "raise",
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
        on_error: str = "raise",
        progress: Progress | None = None,
        **options: Unpack[GradientOptions],
    ) -> Iterator[pa.RecordBatch]:
        """``integrated_gradients`` as one batch per fact, handed out as they finish."""
        if self.session.architecture.held_bytes is not None:
            raise ModelError(
                "integrated gradients go back through all layers, whose weights have to be in memory for that; load "
                "the model with weights='resident'"
            )
        spec = GradientSpec(kinds, **options)
        check_on_error(on_error)
        encoded = self._encode(facts, spec.target, spec.chosen, on_error)
        stream = None
        if spec.baseline == "corrupted" and encoded:
            level = self._sigma(spec.sigma, Noise(), [each.fact for each in encoded])
            stream = NoiseStream(Noise(), level, spec.seed, spec.samples, self.session.sizes.hidden)
        method = IntegratedGradients(self.session, tuple(kinds), spec.steps, spec.chosen, stream)
        return _gradient_batches(method, encoded, progress or (lambda done, of: None))

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
        given, spec = list(prompts), TraceSpec((), samples, sigma, seed, noise=noise)
        patching = Patching(as_runs(interventions), tuple(read), base, spec.corruption, session.sizes, len(given))
        encoded = [patching.encode(prompt, number, session.tokenizer) for number, prompt in enumerate(given)]
        trials = [patching.case(prompt, number) for number, prompt in enumerate(encoded)]
        noised, stream = 1, None
        if patching.corrupts:
            level = self._sigma(spec.sigma, spec.corruption, [each.own.fact for each in encoded])
            noised, stream = samples, NoiseStream(spec.corruption, level, seed, samples, session.sizes.hidden)
        return [patching.result(encoded[i], trials[i], result) for i, result in session.run(trials, noised, stream)]

    def noise_level(self, facts: Iterable[Fact], sigma: float | str = DEFAULT_SIGMA, on_error: str = "raise") -> float:
        """The noise level as a number; ``"<k>sd"`` is k standard deviations of these facts' subject embeddings.

        With ``on_error="skip"``, of those facts among them that can be traced.
        """
        value, in_deviations = parse_sigma(sigma)
        if not in_deviations:
            return value
        check_on_error(on_error)
        encoded = self._encode(facts, "label", "all", on_error)
        return value * self.session.subject_deviation([each.fact for each in encoded])

    def embedding_noise(self, texts: Iterable[str], dof: float | None = None, replace: bool = False) -> Noise:
        """Multivariate noise, or t noise with ``dof``, with mean and covariance of the token-embedding outputs over
        running text (METHODS 2)."""
        tokens = [token for text in texts for token in self.session.tokenizer(text)["input_ids"]]
        if len(tokens) < 2:
            raise ExperimentError("embedding noise needs running text of at least two tokens")
        if max(tokens) >= self.session.sizes.vocabulary:
            raise ExperimentError("the text has tokens outside the model's vocabulary; use the model's own tokenizer")
        with torch.inference_mode():
            return Noise.like(tokens, self.session.architecture.embed, dof, replace)

    def _encode(
        self, facts: Iterable[Fact], target: str, tokens: str | tuple[int, ...], on_error: str
    ) -> list[EncodedFact]:
        return self.session.encode(
            list(facts), target, on_error, lambda each: choose_tokens(tokens, len(each.prompt), each.span, each.fact.id)
        )

    def _tracing(self, facts: Iterable[Fact], states: States, on_error: str, options: TraceOptions) -> _TraceRun:
        """Check every argument and every fact."""
        session = self.session
        spec = TraceSpec(as_states(states, session.sizes.heads), **options)
        check_on_error(on_error)
        noise = spec.corruption
        others: dict[str, tuple[int, ...]] = {}

        def check(fact: EncodedFact) -> None:
            choose_tokens(spec.chosen, len(fact.prompt), fact.span, fact.fact.id)
            if noise.kind == "counterfactual":
                others[fact.fact.id] = counterfactual_prompt(fact, session.tokenizer, session.sizes)

        encoded = session.encode(list(facts), spec.target, on_error, check)
        sigma = self._sigma(spec.sigma, noise, [each.fact for each in encoded])
        restoring = CausalTracing(spec, session.sizes.depth)
        pairs = [restoring.case(fact, others.get(fact.fact.id)) for fact in encoded]
        trials, grids = [trial for trial, _ in pairs], [grid for _, grid in pairs]
        stream = NoiseStream(noise, sigma, spec.seed, restoring.samples, session.sizes.hidden, restoring.draws)
        return _TraceRun(encoded, trials, grids, spec.states, spec.method, restoring.samples, stream)

    def _sigma(self, sigma: float | str, noise: Noise, facts: Sequence[Fact]) -> float:
        """The noise level as a number, where the noise has one; all facts are checked by now."""
        if noise.mean is not None and len(noise.mean) != self.session.sizes.hidden:
            raise ExperimentError(
                f"the noise has {len(noise.mean)} dimensions, the embeddings {self.session.sizes.hidden}"
            )
        if not facts or noise.kind not in SCALED_NOISES:
            return 0.0
        value, in_deviations = parse_sigma(sigma)
        return value * self.session.subject_deviation(facts) if in_deviations else value

    def _batches(self, study: _TraceRun, progress: Progress | None) -> Iterator[pa.RecordBatch]:
        total = len(study.facts)
        report = progress or (lambda done, of: None)
        report(0, total)
        for number, result in self.session.run(study.trials, study.samples, study.noise):
            fact = study.facts[number]
            texts = token_texts(fact.prompt, self.session.tokenizer)
            yield trace_batch(fact, study.method, study.grids[number], study.states, texts, result.log_p)
            report(number + 1, total)


def _gradient_batches(
    method: IntegratedGradients, facts: Sequence[EncodedFact], progress: Progress
) -> Iterator[pa.RecordBatch]:
    progress(0, len(facts))
    for done, (fact, attribution) in enumerate(zip(facts, method.of(facts), strict=True), start=1):
        yield gradient_batch(fact.fact.id, attribution)
        progress(done, len(facts))
