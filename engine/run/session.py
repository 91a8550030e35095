"""A model made ready for experiments: checked, with a budget of memory, and with plans kept from one to the next."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from causalcone.engine.errors import CausalconeError, ExperimentError, ModelError
from causalcone.engine.facts import EncodedFact, Fact, check_unique, encode, subject_ids
from causalcone.engine.memory import default_budget, parse_bytes
from causalcone.engine.models import family_of, read_architecture
from causalcone.engine.models.base import Architecture
from causalcone.engine.noise import subject_deviation
from causalcone.engine.plan.cost import Cost, cost
from causalcone.engine.run.runner import PassRunner, Result, Trial
from causalcone.engine.run.scheduler import Budget, PlanCache, plan_budget
from causalcone.engine.run.verify import verify_model
from causalcone.kernels.backends import TORCH, BackendError, Backends, choose
from causalcone.kernels.precision import each_within, float32_products

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SkippedFacts(UserWarning):
    """Facts left out under ``on_error="skip"``; ``reasons`` has a line for each, and so has the message."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"{len(reasons)} facts skipped:\n" + "\n".join(reasons))


class Session:
    """A transformers model and its tokenizer, what to compute in and where, and how much memory a pass may take."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        memory: int | str | None = None,
        kernels: str | None = None,
        architecture: Architecture | None = None,
        tf32: bool = False,
    ) -> None:
        self.architecture = architecture or read_architecture(model)
        if not getattr(tokenizer, "is_fast", False):
            raise ExperimentError("the tokenizer gives no character offsets; load its fast form with AutoTokenizer")
        self.model, self.tokenizer = model, tokenizer
        self.sizes = self.architecture.sizes
        weight = self.architecture.unembedding()[0]
        self.dtype = weight.dtype if dtype is None else as_dtype(dtype)
        self.device = weight.device if device is None else as_device(device)
        self.kernels, self.tf32 = kernels, tf32
        self.backends = as_backends(kernels, self.device, self.dtype)
        self._memory = None if memory is None else parse_bytes(memory)
        self._plans, self._gradient_plans = PlanCache(), PlanCache()
        self._verified: tuple[tuple[int, int | None], ...] | None = None

    def encode(
        self, facts: Sequence[Fact], target: str, on_error: str, check: Callable[[EncodedFact], object]
    ) -> list[EncodedFact]:
        """Facts as token ids, of which ``check`` raises no error; those that cannot be used are skipped, if asked."""
        check_unique(facts)
        encoded, skipped = [], []
        for fact in facts:
            try:
                each = encode(fact, self.tokenizer, target, self.sizes.vocabulary, self.sizes.positions)
                check(each)
            except CausalconeError as error:
                if on_error == "raise":
                    raise
                skipped.append(str(error))
            else:
                encoded.append(each)
        if skipped:
            warnings.warn(SkippedFacts(skipped), stacklevel=5)
        return encoded

    def subject_deviation(self, facts: Sequence[Fact]) -> float:
        """The standard deviation of the embeddings of the facts' subjects (METHODS 2)."""
        subjects = [subject_ids(fact, self.tokenizer) for fact in facts]
        if not any(subjects):
            raise ExperimentError("sigma in standard deviations needs at least one fact whose subject has tokens")
        if max(map(max, filter(None, subjects))) >= self.sizes.vocabulary:
            raise ExperimentError("a subject has tokens outside the model's vocabulary; use the model's own tokenizer")
        with torch.inference_mode():
            return subject_deviation(subjects, self.architecture.embed)

    def job(
        self,
        cases: Sequence[Trial],
        samples: int = 1,
        noise: Callable[[int, range], np.ndarray] | None = None,
        gradient: bool = False,
    ) -> PassRunner:
        """The cases made ready to run; with ``gradient``, the gradients of p by the given vectors are results too."""
        plans = self._gradient_plans if gradient else self._plans
        noise = noise or self._no_noise
        return PassRunner(
            self.architecture, cases, samples, noise, self.dtype, self.device, plans, gradient, self.backends
        )

    def results(self, job: PassRunner) -> Iterator[tuple[int, Result]]:
        """Verify the model, then run the job: the number of each case in order, with its result."""
        if job.cases:
            budget = self.budget(job.gradient)
            self.verify(job.cases[0].prompts[0])
            yield from each_within(self.computing, job.results(budget))

    def costs(self, job: PassRunner) -> Iterator[tuple[int, list[Cost]]]:
        """For each pass, the bytes it needs at its peak, and what each of its parts costs; nothing is computed."""
        for parts, bytes_needed in job.passes(self.budget(job.gradient)):
            yield (
                bytes_needed,
                [
                    cost(job.plan(part)[0], self.sizes, 1, len(part.samples), not job.cases[part.fact].targets)
                    for part in parts
                ],
            )

    def budget(self, gradient: bool = False) -> Budget:
        """What a pass may take, forwards or with the way back."""
        total = self._memory or default_budget(self.device)
        weight = self.architecture.unembedding()[0]
        shared = weight.device.type == self.device.type and weight.dtype == self.dtype
        held = self.architecture.held_bytes
        return plan_budget(total, self.sizes, self.dtype, self.device, shared, gradient, held)

    def _no_noise(self, span: int, samples: range) -> np.ndarray:
        return np.zeros((len(samples), 1, span, self.sizes.hidden))

    def computing(self) -> AbstractContextManager[None]:
        """Within it float32 products are as exact as asked for, and kernels start on the session's device."""
        return _computing(self.device, self.tf32)

    def verify(self, tokens: tuple[int, ...]) -> None:
        """Refuse what cannot be read, and compare with the model's own forward once for every state of its weights."""
        self.architecture.refuse_unreadable()
        versions = self.versions()
        if versions != self._verified:
            with _computing(self.architecture.unembedding()[0].device, tf32=False):
                verify_model(self.architecture, tokens, self.budget().tiles, self._verifying)
            self._verified = versions

    @property
    def _verifying(self) -> Backends:
        """Backends for a pass in the model's own dtype and on its device."""
        weight = self.architecture.unembedding()[0]
        return self.backends if (weight.dtype, weight.device) == (self.dtype, self.device) else TORCH

    def versions(self) -> tuple[tuple[int, int | None], ...]:
        """What changes whenever the model's weights do."""
        return self.architecture.versions()


@contextmanager
def _computing(device: torch.device, tf32: bool) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(float32_products(tf32))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def load_model(path: str, dtype: torch.dtype | str | None, device: torch.device | str | None) -> tuple[Any, Any]:
    """The model and tokenizer of a folder or hub id; its weights are kept in ``dtype``, as saved by default."""
    from transformers import AutoModelForCausalLM

    wanted = None if dtype is None else as_dtype(dtype)
    with _opening(path) as place:
        tokenizer = _supported(place)[1]
        model = AutoModelForCausalLM.from_pretrained(place, dtype=wanted or "auto")
    if device is not None:
        model = model.to(as_device(device))  # type: ignore[arg-type]
    return model, tokenizer


def stream_model(
    path: str,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    memory: int | str | None = None,
    kernels: str | None = None,
    tf32: bool = False,
) -> Session:
    """A session on the model of a folder or hub id, whose weights every pass reads from its files anew."""
    from causalcone.engine.streaming.loading import open_streamed

    wanted, place = None if dtype is None else as_dtype(dtype), as_device("cpu" if device is None else device)
    with _opening(path) as folder:
        config, tokenizer = _supported(folder)
        architecture = open_streamed(folder, config, wanted, place)
    return Session(architecture.model, tokenizer, memory=memory, architecture=architecture, kernels=kernels, tf32=tf32)


def _supported(path: str) -> tuple[Any, Any]:
    """Config and tokenizer of a model, whose architecture is a supported one."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(path)
    family_of(config.model_type)
    return config, AutoTokenizer.from_pretrained(path)


@contextmanager
def _opening(path: str) -> Iterator[str]:
    """The path as transformers takes it; what goes wrong there is a ``ModelError``."""
    from safetensors import SafetensorError

    place = path
    if path.startswith((".", "/", "~")):
        place = str(Path(path).expanduser())
        if not Path(place).is_dir():
            raise ModelError(f"the model folder {place} does not exist")
    try:
        yield place
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, CausalconeError):
            raise
        raise ModelError(f"no model can be loaded from {place!r}: {error}") from error


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype of torch from itself or its name."""
    named = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if named is None or named not in DTYPES.values():
        raise ExperimentError(f"dtype {dtype!r} is not supported; choose from {', '.join(DTYPES)}")
    return named


def as_backends(kernels: str | None, device: torch.device, dtype: torch.dtype) -> Backends:
    """Which kernels passes use (``kernels/backends.py``)."""
    try:
        return choose(device, dtype, kernels)
    except BackendError as error:
        raise ExperimentError(str(error)) from error


def as_device(device: torch.device | str) -> torch.device:
    """A device of torch that is there."""
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ExperimentError(f"unknown device {device!r}; choose cpu, cuda, or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ExperimentError(f"there is no device {device}; this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device()) if chosen == torch.device("cuda") else chosen
