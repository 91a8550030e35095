"""A model made ready for experiments: checked, with a budget of memory, and with plans kept from one to the next."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from causalcone.engine.compute import Compute, as_backends
from causalcone.engine.encoding import EncodedFact, PromptEncoder, PromptForm, PromptWarning, prompt_notes, subject_ids
from causalcone.engine.errors import ExperimentError
from causalcone.engine.facts import Fact, OnError, Skipped, check_unique, usable
from causalcone.engine.memory import default_budget
from causalcone.engine.models import read_architecture
from causalcone.engine.models.base import Architecture
from causalcone.engine.noise import Noise, parse_sigma, subject_deviation
from causalcone.engine.plan.cost import Cost, cost
from causalcone.engine.run.runner import PassRunner, Result, Trial
from causalcone.engine.run.scheduler import Budget, PlanCache, plan_budget
from causalcone.engine.run.verify import verify_model
from causalcone.kernels.backends import TORCH
from causalcone.kernels.precision import each_within, float32_products

Noised = Callable[[int, range], np.ndarray]
"""The noise of a span of n tokens, for a range of samples (``NoiseStream``)."""


class Session:
    """A transformers model and its tokenizer, and how passes compute. One serves a tracer, an editor and moments."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        compute: Compute | None = None,
        architecture: Architecture | None = None,
        form: PromptForm | None = None,
    ) -> None:
        compute = compute or Compute()
        self.architecture = architecture or read_architecture(model)
        if not getattr(tokenizer, "is_fast", False):
            raise ExperimentError("the tokenizer gives no character offsets; load its fast form with AutoTokenizer")
        self.model, self.tokenizer = model, tokenizer
        self.sizes = self.architecture.sizes
        self.prompts = PromptEncoder(tokenizer, self.sizes.vocabulary, self.sizes.positions, form or PromptForm())
        self._told: set[str] = set()
        weight = self.architecture.unembedding()[0]
        self.dtype, self.device = compute.dtype or weight.dtype, compute.device or weight.device
        self.backends = as_backends(compute.kernels, self.device, self.dtype)
        self.memory, self.tf32 = compute.memory, compute.tf32
        self._plans, self._gradient_plans = PlanCache(), PlanCache()
        self._verified: tuple[tuple[int, int | None], ...] | None = None

    def encode(
        self,
        facts: Sequence[Fact],
        target: str,
        on_error: OnError,
        ready: Callable[[EncodedFact], EncodedFact] = lambda fact: fact,
    ) -> tuple[list[EncodedFact], list[Skipped]]:
        """Facts as token ids, as ``ready`` makes them or refuses them; and those that cannot be used, if these are to
        be skipped."""
        check_unique(facts)
        encoded, skipped = usable(
            facts, lambda fact: ready(self.prompts.fact(fact, target)), lambda fact: fact.id, on_error
        )
        self.tell(encoded)
        return encoded, skipped

    def tell(self, facts: Sequence[EncodedFact]) -> None:
        """Warn, once each, of what is to be known about prompts."""
        for note, text in prompt_notes(facts):
            if note not in self._told:
                self._told.add(note)
                warnings.warn(text, PromptWarning, stacklevel=3)

    def noise_level(self, sigma: float | str, facts: Sequence[Fact]) -> float:
        """The noise level as a number: ``"<k>sd"`` is k standard deviations of the facts' subject embeddings."""
        value, in_deviations = parse_sigma(sigma)
        if not in_deviations:
            return value
        subjects = [subject_ids(fact, self.tokenizer) for fact in facts]
        if not any(subjects):
            raise ExperimentError("sigma in standard deviations needs at least one fact whose subject has tokens")
        self._check_vocabulary(max(map(max, filter(None, subjects))), "a subject")
        with torch.inference_mode():
            return value * subject_deviation(subjects, self.architecture.embed)

    def embedding_noise(self, texts: Iterable[str], dof: float | None, replace: bool) -> Noise:
        """Noise like the embeddings of running text."""
        tokens = [token for text in texts for token in self.tokenizer(text)["input_ids"]]
        if len(tokens) < 2:
            raise ExperimentError("embedding noise needs running text of at least two tokens")
        self._check_vocabulary(max(tokens), "the text")
        with torch.inference_mode():
            return Noise.like(tokens, self.architecture.embed, dof, replace)

    def _check_vocabulary(self, largest: int, name: str) -> None:
        if largest >= self.sizes.vocabulary:
            raise ExperimentError(f"{name} has tokens outside the model's vocabulary; use the model's own tokenizer")

    def run(
        self, trials: Sequence[Trial], samples: int = 1, noise: Noised | None = None, gradient: bool = False
    ) -> Iterator[tuple[int, Result]]:
        """Run the trials, once the model is verified: the number of each in order, with its result.

        samples, noise: of the corrupted runs. gradient: the gradients of p by the given vectors are results too. The
        call itself raises ``MemoryBudgetError`` where not even the smallest part of a trial fits.
        """
        runner, budget = self._runner(trials, samples, noise, gradient), self.budget(gradient)
        runner.check_smallest(budget)
        return self._results(runner, budget)

    def _results(self, runner: PassRunner, budget: Budget) -> Iterator[tuple[int, Result]]:
        if runner.trials:
            self.verify(runner.trials[0].prompts[0])
            yield from each_within(self.computing, runner.results(budget))

    def costs(
        self, trials: Sequence[Trial], samples: int = 1, noise: Noised | None = None
    ) -> Iterator[tuple[int, list[Cost]]]:
        """For each pass of ``run``, the bytes it needs at its peak, and what each of its parts costs; nothing is
        computed."""
        runner = self._runner(trials, samples, noise, False)

        for planned, bytes_needed in runner.passes(self.budget()):
            yield (
                bytes_needed,
                [cost(plan, self.sizes, 1, len(part.samples), not trials[part.fact].targets) for part, plan in planned],
            )

    def _runner(self, trials: Sequence[Trial], samples: int, noise: Noised | None, gradient: bool) -> PassRunner:
        return PassRunner(
            architecture=self.architecture,
            trials=trials,
            samples=samples,
            noise=noise or (lambda span, samples: np.zeros((len(samples), 1, span, self.sizes.hidden))),
            dtype=self.dtype,
            device=self.device,
            plans=self._gradient_plans if gradient else self._plans,
            gradient=gradient,
            backends=self.backends,
        )

    def budget(self, gradient: bool = False) -> Budget:
        """What a pass may take, forwards or with the way back."""
        total, weight = self.memory or default_budget(self.device), self.architecture.unembedding()[0]
        shared = weight.device == self.device and weight.dtype == self.dtype
        held, backends = self.architecture.held_bytes, TORCH if gradient else self.backends
        return plan_budget(total, self.sizes, self.dtype, self.device, shared, gradient, held, backends)

    def computing(self, full: bool = False) -> AbstractContextManager[None]:
        """Within it float32 products are as exact as asked for, or ``full``, and kernels start on the session's
        device."""
        return _computing(self.device, self.tf32 and not full)

    def verify(self, tokens: tuple[int, ...]) -> None:
        """Refuse what cannot be read, and compare with the model's own forward once for every state of its weights."""
        self.architecture.refuse_unreadable()
        versions = self.architecture.versions()
        if versions != self._verified:
            weight = self.architecture.unembedding()[0]  # what the model's own dtype and device are told by
            backends = self.backends if (weight.dtype, weight.device) == (self.dtype, self.device) else TORCH
            with _computing(weight.device, tf32=False):
                verify_model(self.architecture, tokens, self.budget().tiles, backends)
            self._verified = versions


@contextmanager
def _computing(device: torch.device, tf32: bool) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(float32_products(tf32))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield
