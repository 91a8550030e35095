"""What a command works on: a tracer, facts, and a record of those that were left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
import transformers

from causalcone.engine.compute import Compute, as_dtype
from causalcone.engine.errors import FactError
from causalcone.engine.facts import Fact
from causalcone.engine.localize.tracer import Tracer
from causalcone.engine.run import loading
from causalcone.engine.run.session import Session, SkippedFacts
from causalcone.runners.facts.files import SkippedRecords, load_facts
from causalcone.runners.options import ComputeOptions, PassOptions, SourceOptions, StreamableSourceOptions

Started = TypeVar("Started")


@dataclass(frozen=True)
class Inputs:
    """A tracer and facts.

    every: all facts of the file, which the noise level is that of; facts: those within the limit. skipped: why records
    and facts were left out.
    """

    source: SourceOptions
    tracer: Tracer
    every: list[Fact]
    on_error: Literal["raise", "skip"]
    skipped: list[str] = field(default_factory=list)

    @property
    def facts(self) -> list[Fact]:
        return self.every[: self.source.limit]

    def started(self, start: Callable[[], Started]) -> tuple[Started, int]:
        """What ``start`` returns, which checks all facts, and how many of them are left."""
        with noted(self.skipped) as now:
            batches = start()
        if len(now) == len(self.facts):
            raise FactError(f"none of the facts of {self.source.facts} can be traced")
        self.check_memory()
        return batches, len(self.facts) - len(now)

    def check_memory(self) -> None:
        """Refuse memory that is too little for the least there is to compute: one run of the longest fact."""
        longest = max(self.facts, key=lambda fact: len(fact.text))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SkippedFacts)
            self.tracer.plan([longest], (("hidden", 1),), samples=1, sigma=0.0, tokens="last", on_error=self.on_error)

    def noise_level(self, sigma: str) -> float:
        """The noise level as a number."""
        with noted(self.skipped):
            return self.tracer.noise_level(self.every, sigma, self.on_error)

    @property
    def configuration(self) -> dict[str, object]:
        """What to keep of all this beside the results."""
        backends = self.tracer.session.backends
        return {
            "model": self.source.model,
            "facts": self.source.facts,
            "dtype": str(self.tracer.dtype).removeprefix("torch."),
            "device": str(self.tracer.device),
            "kernels": {"attention": backends.attention, "rows": backends.rows},
            "tf32": self.source.tf32,
            **({"weights": self.source.weights} if isinstance(self.source, StreamableSourceOptions) else {}),
            "limit": self.source.limit,
            "on_error": self.on_error,
            "skipped": self.skipped,
        }


def open_inputs(source: SourceOptions) -> Inputs:
    """Read the facts, then the model."""
    on_error: Literal["raise", "skip"] = "skip" if source.skip_bad_facts else "raise"
    if source.dtype is not None:
        as_dtype(source.dtype)
    if isinstance(source, StreamableSourceOptions):
        loading.check_weights(source.weights)
    skipped: list[str] = []
    with noted(skipped):
        facts = load_facts(source.facts_path(), on_error=on_error)
    return Inputs(source, Tracer.on(open_session(source)), facts, on_error, skipped)


@contextmanager
def noted(skipped: list[str]) -> Iterator[list[str]]:
    """Add to ``skipped`` what warnings say of facts left out; they are shown all the same. Gives those of this time."""
    now: list[str] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            for kind in (SkippedFacts, SkippedRecords):
                warnings.simplefilter("always", kind)
            yield now
            for each in caught:
                if isinstance(each.message, SkippedRecords):
                    now += each.message.problems
                elif isinstance(each.message, SkippedFacts):
                    now += each.message.reasons
    finally:
        for each in caught:
            warnings.showwarning(each.message, each.category, each.filename, each.lineno)
        skipped += [reason for reason in now if reason not in skipped]


def open_session(source: SourceOptions | ComputeOptions) -> Session:
    """A session on the model, read now; it is computed with in the way that the options say."""
    transformers.utils.logging.disable_progress_bar()
    device = source.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kernels, tf32 = (source.kernels, source.tf32) if isinstance(source, SourceOptions | PassOptions) else (None, False)
    compute = Compute.of(source.dtype, device, source.memory, kernels, tf32)
    weights = source.weights if isinstance(source, StreamableSourceOptions) else "resident"
    return loading.open_session(source.model_path(), compute, weights)
