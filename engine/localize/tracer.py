"""``Tracer``: the localization methods on many facts, with every layer and window in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import pyarrow as pa
import torch

from causalcone.engine.compute import Compute, Kernels
from causalcone.engine.encoding import PromptForm, PromptOptions, token_texts
from causalcone.engine.errors import ExperimentError
from causalcone.engine.facts import Fact, OnError, Skipped, SkippedFacts, prompt_fact
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
from causalcone.engine.localize.patching import Patching
from causalcone.engine.localize.prompt_runs import Prompt, PromptResult, Read, Runs, as_runs
from causalcone.engine.localize.states import KINDS, States, as_states
from causalcone.engine.localize.trace_run import FactsRun, TracePlan, TraceRun
from causalcone.engine.noise import SCALED_NOISES, Noise, NoiseKind, NoiseStream, parse_sigma
from causalcone.engine.run.loading import Weights, open_session
from causalcone.engine.run.session import Session

if TYPE_CHECKING:
    from causalcone.analysis.prompt_map import PromptMap


class Tracer:
    """Localizes facts in a transformers model, which is read and never changed.

    Args:
        model: A causal language model of a supported architecture.
        tokenizer: Its fast tokenizer (offsets are needed).
        dtype: Dtype to compute in; the model's own if None.
        device: Device to compute on; the model's own if None.
        memory: Bytes, or a text such as ``"4GiB"``, that a pass may take; half of what is free if None.
        kernels: Forces what passes without gradient compute with: ``"torch"``, ``"triton"``, or ``"flash"`` (attention
            with flash-attn, in bfloat16 or float16). By default Triton on CUDA devices and torch elsewhere, and in
            float64 always torch. The variable CAUSALCONE_KERNELS says the same for all tracers, CAUSALCONE_ATTENTION
            for attention alone.
        tf32: Multiply float32 rows with weights in TF32 on CUDA devices, faster and with 10 bits of mantissa; else in
            full float32, whatever torch is set to.
        prompts: How prompts are put to the model: chat=False (as the user's message in the tokenizer's chat template,
            which the answer follows), system=None (the system's message), bos="auto" (whether prompts begin with the
            BOS token: "always", "never", or as the tokenizer does it) and keep_space=False (spaces at a prompt's end
            are cut by default, and a space before the answer joins the two).

    Raises:
        ModelError: The model's parameters cannot be read directly.
        ExperimentError: The kernels cannot be used here.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        memory: int | str | None = None,
        kernels: Kernels | None = None,
        tf32: bool = False,
        **prompts: Unpack[PromptOptions],
    ) -> None:
        compute = Compute.of(dtype, device, memory, kernels, tf32)
        self.session = Session(model, tokenizer, compute, form=PromptForm(**prompts))

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
        kernels: Kernels | None = None,
        tf32: bool = False,
        **prompts: Unpack[PromptOptions],
    ) -> Tracer:
        """A tracer for a saved model.

        Args:
            path: A model folder, a hub id, a GGUF file, or ``smollm2`` (docs/architectures.md).
            dtype: Dtype of the weights and to compute in; as saved if None.
            device: As for ``Tracer``, and so are memory, kernels and tf32.
            weights: ``"resident"`` keeps them on the device; ``"stream"`` reads them from the model's safetensors files
                layer by layer, anew in every pass, for models that are larger than the device. Two layers count as part
                of ``memory`` then, and integrated gradients are refused.
            prompts: As for ``Tracer``.

        Raises:
            ModelError: The model cannot be loaded, or not be computed exactly.
        """
        compute = Compute.of(dtype, device, memory, kernels, tf32)
        return cls.on(open_session(path, compute, weights, PromptForm(**prompts)))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that passes compute in."""
        return self.session.dtype

    @property
    def device(self) -> torch.device:
        """The device that passes compute on."""
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
        """Causal tracing (docs/methods.md, "Causal tracing"; Meng et al. 2022).

        The probability of each fact's target when its subject is corrupted and one window of layers is restored to its
        clean value at one token, for every state, centre layer and token. All facts are checked before anything is
        computed.

        Args:
            facts: The facts, with different ids.
            states: (kind, window) pairs, ``State`` or texts such as ``"mlp:10"``; kind is hidden, mlp, attn, head.N
                (one head before the output projection) or heads (each of them).
            on_error: ``"skip"`` leaves out facts that cannot be traced and warns ``SkippedFacts``.
            progress: Called with the number of facts done and of all facts.
            options: samples=10, sigma="3sd", seed=1, target="label", tokens="all", joint=False, noise=None,
                extra_tokens=0, sever=None and compat=None, as ``TraceSpec`` says.

        Returns:
            A table with the columns of ``TRACE_SCHEMA``, whole facts in their order.

        Raises:
            FactError: A fact cannot be traced.
            ExperimentError: An argument makes no sense.
            ModelError: The model cannot be computed exactly.
            MemoryBudgetError: The memory is too little for the smallest part of a fact.
        """
        return TraceRun.table(self.stream(facts, states, on_error=on_error, progress=progress, **options))

    def stream(
        self,
        facts: Iterable[Fact],
        states: States = DEFAULT_STATES,
        *,
        on_error: OnError = "raise",
        progress: Progress | None = None,
        **options: Unpack[TraceOptions],
    ) -> Iterator[pa.RecordBatch]:
        """``trace`` as one batch per fact, in order, handed out as passes finish; the call checks the arguments."""
        return _told(self._tracing(facts, states, on_error, options)).batches(progress)

    def plan(
        self,
        facts: Iterable[Fact],
        states: States = DEFAULT_STATES,
        *,
        on_error: OnError = "raise",
        **options: Unpack[TraceOptions],
    ) -> TracePlan:
        """The cost of ``trace`` with the same arguments: passes, rows, FLOPs and bytes; nothing is computed."""
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
        """Representation zeroing (docs/methods.md, "Zeroing"; Hase et al. 2023).

        The probability of each fact's target in the clean run with the values of a window set to zero at all of the
        chosen tokens, for every state and centre layer.

        Args:
            facts: As for ``trace``, and so are states, on_error and progress, and what is raised.
            target: ``"label"`` or ``"argmax"``, as ``TraceSpec`` says.
            tokens: The tokens that are zeroed together: ``"all"``, ``"subject_onward"``, ``"subject"``,
                ``"subject_last"``, ``"last"`` or indices.

        Returns:
            A table with the columns of ``TRACE_SCHEMA``, in which ``token`` and ``p_corrupted`` are null.
        """
        stream = self.stream_zero(facts, states, target=target, tokens=tokens, on_error=on_error, progress=progress)
        return TraceRun.table(stream)

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
        """``zero`` as one batch per fact, handed out as passes finish; the call itself checks the arguments."""
        spec = ZeroSpec(states=as_states(states), target=target, tokens=as_tokens(tokens))
        return _told(TraceRun.of(self.session, list(facts), spec, on_error)).batches(progress)

    def integrated_gradients(
        self,
        facts: Iterable[Fact],
        kinds: Sequence[str] = KINDS,
        *,
        on_error: OnError = "raise",
        progress: Progress | None = None,
        **options: Unpack[GradientOptions],
    ) -> pa.Table:
        """Integrated gradients (docs/methods.md, "Integrated gradients"; Meng et al. 2022, Fig. 16).

        Of the target's probability by every state, along the straight line from a baseline to its clean value.

        Args:
            facts: As for ``trace``, and so are on_error and progress, and what is raised.
            kinds: One or more of hidden, mlp and attn.
            options: steps=50, baseline="zero", target="argmax", tokens="all"; samples=10, sigma="3sd" and seed=1 of the
                baseline ``"corrupted"``; as ``GradientSpec`` says.

        Returns:
            A table with the columns of ``GRADIENT_SCHEMA``: the attribution's L2 norm, its total, and its gap, the
            total minus the change in p that it should add up to.
        """
        stream = self.stream_integrated_gradients(facts, kinds, on_error=on_error, progress=progress, **options)
        return GradientRun.table(stream)

    def stream_integrated_gradients(
        self,
        facts: Iterable[Fact],
        kinds: Sequence[str] = KINDS,
        *,
        on_error: OnError = "raise",
        progress: Progress | None = None,
        **options: Unpack[GradientOptions],
    ) -> Iterator[pa.RecordBatch]:
        """``integrated_gradients`` as one batch per fact, handed out as they finish; the call checks the arguments."""
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
        noise: Noise | NoiseKind | None = None,
    ) -> list[PromptResult]:
        """Run interventions of your own, which all localization methods are made of; all runs in one pass.

        Args:
            prompts: Texts, ``Prompt`` or facts.
            interventions: Those of one run, or a list of such lists, one per run.
            read: Logits or states to hand out besides the target's probability.
            base: The base run of every prompt that runs start from: ``"clean"``, ``"corrupted"`` of facts, or
                ``"other"`` (``"other:1"`` for the second other text).
            samples: Noise samples of the corrupted run, where there is one.
            sigma: Noise level, a number or ``"<k>sd"`` for k standard deviations of the subjects' embeddings.
            seed: Of the noise.
            noise: A ``Noise`` or the name of one that needs no more; Gaussian if None.

        Returns:
            A ``PromptResult`` per prompt.

        Raises:
            ExperimentError: An argument makes no sense.
            FactError: A prompt cannot be run.
        """
        session = self.session
        if isinstance(prompts, str | Prompt | Fact):
            raise ExperimentError("prompts are a list; give [prompt] for a single one")
        items = list(prompts)
        spec = TraceSpec.of((("hidden", 1),), samples=samples, sigma=sigma, seed=seed, noise=noise).resolved(session)
        base = "other:0" if base == "other" else base
        patching = Patching(as_runs(interventions), tuple(read), base, spec.corruption, session.sizes, len(items))
        encoded = [patching.encode(prompt, number, session.prompts) for number, prompt in enumerate(items)]
        trials = [patching.trial(prompt, number) for number, prompt in enumerate(encoded)]
        stream = None
        if patching.corrupts:
            scaled = encoded and spec.corruption.kind in SCALED_NOISES
            level = session.noise_level(sigma, [prompt.fact.fact for prompt in encoded]) if scaled else 0.0
            stream = NoiseStream(spec.corruption, level, seed, samples, session.sizes.hidden)
        results = session.run(trials, samples if stream else 1, stream)
        return [patching.result(encoded[i], trials[i], result) for i, result in results]

    def fact(self, prompt: str, subject: str, answer: str | None = None) -> Fact:
        """A prompt as a fact, whose id is ``"prompt"``.

        Args:
            prompt: The prompt, with its subject (of several occurrences the first counts) or one ``{}`` in its place.
            subject: The words that it is about.
            answer: Its answer; the text of the model's most likely next token if None.

        Raises:
            FactError: The subject is empty or not in the prompt, or the answer is empty.
        """
        fact = prompt_fact(prompt, subject, "?" if answer is None else answer)
        if answer is not None:
            return fact
        logits = self.run([fact.text], [], [Read("logits")])[0].clean.values[0]
        (text,) = token_texts([int(logits.argmax())], self.session.tokenizer)
        return replace(fact, target_true=text.strip() or repr(text)[1:-1])

    def show(
        self,
        prompt: str,
        subject: str,
        answer: str | None = None,
        states: States = DEFAULT_STATES,
        **options: Unpack[TraceOptions],
    ) -> PromptMap:
        """``trace`` of one prompt, to look at: a heat map on the terminal (``print``) and in notebooks.

        Args:
            prompt: As for ``fact``, and so are subject and answer; the likeliest token counts, whatever its text.
            states: As for ``trace``, and so are the options, but for the target.

        Returns:
            The map; its ``table`` is what ``trace`` returns.
        """
        options["target"] = "argmax" if answer is None else "label"
        run = self._tracing([self.fact(prompt, subject, answer)], states, "raise", options)
        return run.drawn(run.table(run.batches()))

    def noise_level(
        self, facts: Iterable[Fact], sigma: float | str = DEFAULT_SIGMA, on_error: OnError = "raise"
    ) -> float:
        """The noise level as a number (docs/methods.md, "Corruption").

        Args:
            facts: The facts whose subjects count.
            sigma: A number, or ``"<k>sd"`` for k standard deviations of the facts' subject embeddings.
            on_error: ``"skip"`` leaves out facts that cannot be traced and warns ``SkippedFacts``.
        """
        if not parse_sigma(sigma)[1]:
            return self.session.noise_level(sigma, ())
        encoded, skipped = self.session.encode(list(facts), "label", on_error)
        _warn(skipped)
        return self.session.noise_level(sigma, [fact.fact for fact in encoded])

    def embedding_noise(self, texts: Iterable[str], dof: float | None = None, replace: bool = False) -> Noise:
        """Noise with the mean and covariance of the token embeddings of running text (docs/methods.md, "Corruption").

        Args:
            texts: Running text.
            dof: Degrees of freedom of t noise; multivariate normal noise if None.
            replace: Whether the noise takes the place of the embeddings instead of being added to them.

        Raises:
            ExperimentError: The texts have fewer than two tokens, or tokens outside of the model's vocabulary.
        """
        return self.session.embedding_noise(texts, dof, replace)

    def _tracing(self, facts: Iterable[Fact], states: States, on_error: OnError, options: TraceOptions) -> TraceRun:
        return TraceRun.of(self.session, list(facts), TraceSpec.of(states, **options), on_error)


Run = TypeVar("Run", bound=FactsRun)


def _told(run: Run) -> Run:
    """The run, once it is said which facts it leaves out."""
    _warn(run.skipped)
    return run


def _warn(skipped: Sequence[Skipped]) -> None:
    if skipped:
        warnings.warn(SkippedFacts([fact.reason for fact in skipped]), stacklevel=4)
