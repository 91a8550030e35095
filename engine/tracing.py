"""``Tracer``: causal tracing of many facts, with every layer and window in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from causalcone.engine.branches import check_tokens, choose_tokens
from causalcone.engine.cost import cost, naive_flops
from causalcone.engine.errors import CausalconeError, ExperimentError, ModelError
from causalcone.engine.facts import EncodedFact, Fact, check_unique, encode, subject_ids, token_texts
from causalcone.engine.interventions import State, as_states
from causalcone.engine.job import TraceJob, TraceSpec
from causalcone.engine.memory import default_budget, parse_bytes
from causalcone.engine.models import check_supported, read_architecture
from causalcone.engine.models.refusal import refuse_unreadable
from causalcone.engine.noise import parse_sigma, subject_deviation
from causalcone.engine.passes import Budget, PlanCache, plan_budget
from causalcone.engine.tables import TRACE_SCHEMA, trace_batch
from causalcone.engine.verify import verify_model

DEFAULT_STATES = (("hidden", 1), ("mlp", 10), ("attn", 10))
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

States = Iterable[State | str | tuple[str, int]]
Progress = Callable[[int, int], None]


class SkippedFacts(UserWarning):
    """Facts left out under ``on_error="skip"``; the message lists each with its reason."""


@dataclass(frozen=True)
class TracePlan:
    """What tracing would compute.

    flops: multiply-adds x 2 of all projections and the unembedding, as executed; attention_flops: of attention
    products; naive_flops: what published code spends on the same table (for each state, layer and token one forward
    of 1 + samples sequences with all logits); rows: rows of all layers' outputs; peak_bytes: predicted peak of a pass.
    """

    facts: int
    passes: int
    rows: int
    flops: int
    attention_flops: int
    naive_flops: int
    peak_bytes: int


class Tracer:
    """Traces facts in a transformers model, which is read and never changed.

    model: a causal language model of a supported architecture; tokenizer: its fast tokenizer (offsets are needed).
    dtype: what to compute in, the model's own by default; device: where, the model's own by default.
    memory: bytes (or a text such as ``"4GiB"``) that a pass may take, half of what is free by default.
    Raises ``ModelError`` for models whose parameters cannot be read directly.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        memory: int | str | None = None,
    ) -> None:
        self.architecture = read_architecture(model)
        if not getattr(tokenizer, "is_fast", False):
            raise ExperimentError("the tokenizer gives no character offsets; load its fast form with AutoTokenizer")
        self.model, self.tokenizer = model, tokenizer
        weight = self.architecture.unembedding()[0]
        self.dtype = weight.dtype if dtype is None else as_dtype(dtype)
        self.device = weight.device if device is None else as_device(device)
        self._memory = None if memory is None else parse_bytes(memory)
        self._plans = PlanCache()
        self._verified: tuple[tuple[int, int | None], ...] | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        memory: int | str | None = None,
    ) -> Tracer:
        """A tracer for a model folder or hub id; its weights are kept in ``dtype``, as saved by default."""
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        wanted = None if dtype is None else as_dtype(dtype)
        if path.startswith((".", "/", "~")):
            path = str(Path(path).expanduser())
            if not Path(path).is_dir():
                raise ModelError(f"the model folder {path} does not exist")
        try:
            kind = AutoConfig.from_pretrained(path).model_type
            check_supported(kind)
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=wanted or "auto")
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            if isinstance(error, CausalconeError):
                raise
            raise ModelError(f"no model can be loaded from {path!r}: {error}") from error
        if device is not None:
            model = model.to(as_device(device))  # type: ignore[arg-type]
        return cls(model, tokenizer, memory=memory)

    def trace(
        self,
        facts: Iterable[Fact],
        states: States = DEFAULT_STATES,
        *,
        samples: int = 10,
        sigma: float | str = "3sd",
        seed: int = 1,
        target: str = "label",
        tokens: str | Sequence[int] = "all",
        on_error: str = "raise",
        progress: Progress | None = None,
    ) -> pa.Table:
        """Causal tracing (Meng et al. 2022; METHODS 3): the probability of each fact's target when its subject is
        corrupted by noise and one window of layers is restored to its clean value at one token, for every state, centre
        layer and token.

        states: (kind, window) pairs; kind is hidden, mlp or attn. samples: noise samples to average over. sigma: noise
        level, a number or ``"<k>sd"`` for k standard deviations of the facts' subject embeddings. seed: of the noise.
        target: ``"label"`` (product over all tokens of ``target_true``) or ``"argmax"`` (the clean run's most likely
        token). tokens: ``"all"``, ``"subject_onward"``, ``"subject"``, ``"subject_last"``, ``"last"`` or indices.
        on_error: ``"skip"`` leaves out facts that cannot be traced and warns ``SkippedFacts``. progress: called with
        the number of facts done and of all facts.

        Returns a table with the columns of ``TRACE_SCHEMA``, whole facts in their order. All facts are checked before
        anything is computed. Raises ``FactError``, ``ExperimentError``, ``ModelError`` or ``MemoryBudgetError``, each
        naming the item and the mend.
        """
        batches = self.stream(
            facts,
            states,
            samples=samples,
            sigma=sigma,
            seed=seed,
            target=target,
            tokens=tokens,
            on_error=on_error,
            progress=progress,
        )
        return pa.Table.from_batches(list(batches), schema=TRACE_SCHEMA)

    def stream(
        self,
        facts: Iterable[Fact],
        states: States = DEFAULT_STATES,
        *,
        samples: int = 10,
        sigma: float | str = "3sd",
        seed: int = 1,
        target: str = "label",
        tokens: str | Sequence[int] = "all",
        on_error: str = "raise",
        progress: Progress | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """``trace`` as one batch per fact, handed out as passes finish; arguments are checked by the call itself."""
        job = self._job(facts, states, samples, sigma, seed, target, tokens, on_error)
        return self._stream(job, progress or (lambda done, total: None))

    def plan(
        self,
        facts: Iterable[Fact],
        states: States = DEFAULT_STATES,
        *,
        samples: int = 10,
        sigma: float | str = "3sd",
        seed: int = 1,
        target: str = "label",
        tokens: str | Sequence[int] = "all",
        on_error: str = "raise",
    ) -> TracePlan:
        """What ``trace`` with these arguments would compute; nothing is computed."""
        job = self._job(facts, states, samples, sigma, seed, target, tokens, on_error)
        sizes = self.architecture.sizes
        passes = peak = rows = flops = attention_flops = 0
        for parts, bytes_needed in job.passes(self._budget()):
            passes += 1
            peak = max(peak, bytes_needed)
            for part in parts:
                own = cost(job.plan(part)[0], sizes, 1, len(part.samples), target == "argmax")
                rows += own.rows
                flops += own.flops
                attention_flops += own.attention_flops
        naive = sum(naive_flops(sizes, len(fact.tokens), samples, len(job.branches(fact).run)) for fact in job.facts)
        return TracePlan(len(job.facts), passes, rows, flops, attention_flops, naive, peak)

    def noise_level(self, facts: Iterable[Fact], sigma: float | str = "3sd", on_error: str = "raise") -> float:
        """The noise level as a number; ``"<k>sd"`` is k standard deviations of these facts' subject embeddings.

        With ``on_error="skip"``, of those facts among them that can be traced.
        """
        value, in_deviations = parse_sigma(sigma)
        if not in_deviations:
            return value
        traceable = self._encode(list(facts), "label", "all", on_error)
        subjects = [subject_ids(each.fact, self.tokenizer) for each in traceable]
        if not any(subjects):
            raise ExperimentError(f"sigma {sigma!r} needs at least one fact whose subject has tokens")
        if max(map(max, filter(None, subjects))) >= self.architecture.sizes.vocabulary:
            raise ExperimentError("a subject has tokens outside the model's vocabulary; use the model's own tokenizer")
        with torch.inference_mode():
            return value * subject_deviation(subjects, self.architecture.embed)

    def _job(
        self,
        facts: Iterable[Fact],
        states: States,
        samples: int,
        sigma: float | str,
        seed: int,
        target: str,
        tokens: str | Sequence[int],
        on_error: str,
    ) -> TraceJob:
        """Check every argument and every fact."""
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ExperimentError(f"samples is {samples!r}; give a whole number of noise samples from 1 up")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ExperimentError(f"seed is {seed!r}; give a whole number from 0 to 2**32 - 1")
        if target not in ("label", "argmax"):
            raise ExperimentError(f"unknown target {target!r}; choose 'label' or 'argmax'")
        if on_error not in ("raise", "skip"):
            raise ExperimentError(f"on_error is {on_error!r}; choose 'raise' or 'skip'")
        parse_sigma(sigma)
        parsed, chosen = as_states(states), check_tokens(tokens)
        encoded = self._encode(list(facts), target, chosen, on_error)
        level = self.noise_level([each.fact for each in encoded], sigma) if encoded else 0.0
        spec = TraceSpec(parsed, samples, level, seed, target, chosen)
        return TraceJob(self.architecture, encoded, spec, self.dtype, self.device, self._plans)

    def _encode(
        self, facts: list[Fact], target: str, tokens: str | tuple[int, ...], on_error: str
    ) -> list[EncodedFact]:
        check_unique(facts)
        sizes = self.architecture.sizes
        encoded, skipped = [], []
        for fact in facts:
            try:
                each = encode(fact, self.tokenizer, target, sizes.vocabulary, sizes.positions)
                choose_tokens(tokens, len(each.prompt), each.span, fact.id)
            except CausalconeError as error:
                if on_error == "raise":
                    raise
                skipped.append(str(error))
            else:
                encoded.append(each)
        if skipped:
            warnings.warn(f"{len(skipped)} facts skipped:\n" + "\n".join(skipped), SkippedFacts, stacklevel=4)
        return encoded

    def _stream(self, job: TraceJob, progress: Progress) -> Iterator[pa.RecordBatch]:
        total = len(job.facts)
        progress(0, total)
        if not total:
            return
        budget = self._budget()
        self._verify(job.facts[0], budget)
        for done, (fact, branches, log_p) in enumerate(job.results(budget), start=1):
            texts = token_texts(fact.prompt, self.tokenizer)
            yield trace_batch(fact, branches, job.spec.states, texts, log_p)
            progress(done, total)

    def _budget(self) -> Budget:
        total = self._memory or default_budget(self.device)
        weight = self.architecture.unembedding()[0]
        on_device = weight.device.type == self.device.type
        return plan_budget(
            total, self.architecture.sizes, self.dtype, self.device, shared=on_device and weight.dtype == self.dtype
        )

    def _verify(self, fact: EncodedFact, budget: Budget) -> None:
        """Refuse what cannot be read, and compare with the model's own forward once for every state of its weights."""
        refuse_unreadable(self.model, self.architecture.modules)
        versions = tuple(
            (id(parameter), None if parameter.is_inference() else parameter._version)
            for parameter in self.model.parameters()
        )
        if versions != self._verified:
            verify_model(self.architecture, fact.tokens, budget.tiles)
            self._verified = versions


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype of torch from itself or its name."""
    named = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if named is None or named not in DTYPES.values():
        raise ExperimentError(f"dtype {dtype!r} is not supported; choose from {', '.join(DTYPES)}")
    return named


def as_device(device: torch.device | str) -> torch.device:
    """A device of torch that is there."""
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ExperimentError(f"unknown device {device!r}; choose cpu, cuda, or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ExperimentError(f"there is no device {device}; this machine has {torch.cuda.device_count()} CUDA devices")
    return chosen
