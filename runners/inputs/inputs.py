"""A command's model and facts, and a record of facts that were left out."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar, get_args

import torch
import transformers

from causalcone.engine.compute import Compute, as_dtype
from causalcone.engine.encoding import PromptForm
from causalcone.engine.errors import ExperimentError, FactError, one_of
from causalcone.engine.facts import Fact, OnError, Skipped, SkippedFacts
from causalcone.engine.localize.trace_run import FactsRun
from causalcone.engine.localize.tracer import Tracer
from causalcone.engine.noise import parse_sigma
from causalcone.engine.run import loading
from causalcone.engine.run.session import Session
from causalcone.runners.facts.files import SkippedRecords, read_facts
from causalcone.runners.facts.formats.flat import parse_columns
from causalcone.runners.facts.schemas import Reading
from causalcone.runners.names import path_of
from causalcone.runners.options import (
    ComputeOptions,
    PromptFormOptions,
    SinglePromptOptions,
    SourceOptions,
    StreamableSourceOptions,
)

Run = TypeVar("Run", bound=FactsRun)


@dataclass(frozen=True)
class Inputs:
    """A session on a model, and facts. every: all facts of the file, which the noise level is that of; facts: those
    within the limit; skipped: why records and facts were left out."""

    source: SourceOptions
    session: Session
    every: list[Fact]
    on_error: OnError
    skipped: list[str] = field(default_factory=list)

    @property
    def single(self) -> bool:
        """Whether there is one prompt and no file."""
        return isinstance(self.source, SinglePromptOptions) and self.source.prompt is not None

    @property
    def facts(self) -> list[Fact]:
        return self.every[: self.source.limit]

    @property
    def tracer(self) -> Tracer:
        return Tracer.on(self.session)

    def used(self, run: Run) -> Run:
        """A run of facts, once it is said which it leaves out; an error where it leaves out all."""
        self.leave_out(run.skipped)
        if not run.facts:
            raise FactError(f"none of the facts of {self.source.facts or '--prompt'} can be traced")
        return run

    def leave_out(self, skipped: Sequence[Skipped]) -> None:
        """Warn of facts that are left out, and keep the reasons."""
        reasons = [fact.reason for fact in skipped]
        if reasons:
            warnings.warn(SkippedFacts(reasons), stacklevel=2)
        self.skipped.extend(reason for reason in reasons if reason not in self.skipped)

    def noise_level(self, sigma: str) -> float:
        if not parse_sigma(sigma)[1]:
            return self.session.noise_level(sigma, ())
        encoded, skipped = self.session.encode(self.every, "label", self.on_error)
        self.leave_out(skipped)
        return self.session.noise_level(sigma, [prompt.fact for prompt in encoded])

    @property
    def configuration(self) -> dict[str, object]:
        backends = self.session.backends
        return {
            "model": self.source.model,
            "facts": self.source.facts,
            **({"prompt": self.source.asked} if isinstance(self.source, SinglePromptOptions) and self.single else {}),
            **({"columns": list(self.source.column)} if self.source.column else {}),
            "dtype": str(self.session.dtype).removeprefix("torch."),
            "device": str(self.session.device),
            "kernels": {"attention": backends.attention, "rows": backends.rows},
            "tf32": self.source.tf32,
            **({"weights": self.source.weights} if isinstance(self.source, StreamableSourceOptions) else {}),
            "limit": self.source.limit,
            "on_error": self.on_error,
            "skipped": self.skipped,
        }


def open_inputs(source: SourceOptions) -> Inputs:
    """Read the facts, or the prompt that is given in their place, and the model."""
    prompt = source if isinstance(source, SinglePromptOptions) else SinglePromptOptions()
    _check_given(source.facts, prompt)
    on_error: OnError = "skip" if source.skip_bad_facts else "raise"
    if source.dtype is not None:
        as_dtype(source.dtype)
    if isinstance(source, StreamableSourceOptions):
        one_of("weights", source.weights, get_args(loading.Weights))
    if prompt.prompt is not None:
        session = open_session(source)
        fact = Tracer.on(session).fact(prompt.prompt, str(prompt.subject), prompt.answer)
        return Inputs(source, session, [fact], on_error)
    path = path_of(str(source.facts), "facts")
    how = Reading(columns=parse_columns(source.column or ()))
    facts, problems, _ = read_facts(path, how, on_error=on_error)
    if problems:
        warnings.warn(SkippedRecords(Path(path), problems), stacklevel=2)
    return Inputs(source, open_session(source), facts, on_error, problems)


def _check_given(facts: str | None, prompt: SinglePromptOptions) -> None:
    """Refuse a prompt without its subject, two sources of facts, and none."""
    if prompt.prompt is None:
        extra = next((f"--{name}" for name, value in prompt.asked.items() if value is not None), None)
        if extra is not None:
            raise ExperimentError(f"{extra} goes with --prompt, the prompt that it is of; give that, or leave it out")
        if facts is None:
            raise ExperimentError("there are no facts: give --facts with a file, or one --prompt and its --subject")
    elif facts is not None:
        raise ExperimentError("--prompt stands for a single fact, --facts for a file of them; give one of the two")
    elif prompt.subject is None:
        raise ExperimentError("--subject is missing: give the words of the prompt that it is about")


def open_session(source: ComputeOptions) -> Session:
    """A session on the model of the options, read now."""
    kernels, tf32 = (source.kernels, source.tf32) if isinstance(source, SourceOptions) else (None, False)
    compute = Compute.of(source.dtype, source.device, source.memory, kernels, tf32)
    weights = source.weights if isinstance(source, StreamableSourceOptions) else "resident"
    form = None
    if isinstance(source, PromptFormOptions):
        form = PromptForm(**{field.name: getattr(source, field.name) for field in fields(PromptFormOptions)})
    return open_model(path_of(source.model, "model"), compute, weights, form)


def open_model(path: str, compute: Compute, weights: str = "resident", form: PromptForm | None = None) -> Session:
    """A session on the model of a folder or hub id, read now, by default on a GPU where there is one."""
    transformers.utils.logging.disable_progress_bar()
    device = compute.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return loading.open_session(path, replace(compute, device=device), weights, form)
