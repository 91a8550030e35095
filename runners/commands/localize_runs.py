"""Runs that localize facts, prepared from the options of a command: all is checked, and nothing computed yet."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from causalcone.engine.errors import ExperimentError
from causalcone.engine.localize.gradients import GradientRun
from causalcone.engine.localize.options import DEFAULT_STATES, GradientSpec, TraceSpec, ZeroSpec
from causalcone.engine.localize.states import KINDS, as_states
from causalcone.engine.localize.trace_run import TracePlan, TraceRun
from causalcone.engine.noise import SCALED_NOISES, Noise, TextNoise
from causalcone.engine.schemas import GRADIENT_SCHEMA, TRACE_SCHEMA
from causalcone.runners.checked_files import read_text
from causalcone.runners.inputs.inputs import Inputs, open_inputs
from causalcone.runners.options import (
    IntegrationOptions,
    SamplingOptions,
    SourceOptions,
    TracingOptions,
    ZeroingOptions,
)
from causalcone.runners.results.folder import ResultFolder
from causalcone.runners.show.progress import shown_progress


@dataclass(frozen=True)
class RunSummary:
    """The table that a run has written to ``path`` in ``seconds``; ``first`` are the batches of the first facts."""

    path: Path
    facts: int
    rows: int
    seconds: float
    first: tuple[pa.RecordBatch, ...]

    @property
    def results(self) -> dict[str, Any]:
        """The numbers for ``run.json``."""
        return {"facts": self.facts, "rows": self.rows, "seconds": round(self.seconds, 3)}

    def sentence(self) -> str:
        rate = f"{self.seconds:.1f} s ({self.facts / self.seconds:.2f} facts/s)"
        return f"{self.facts} facts, {self.rows} rows in {rate} -> {self.path}"


@dataclass(frozen=True, kw_only=True)
class TableRun:
    """A run that makes one table: ``batches``, one for each of ``facts`` facts. configuration: kept beside it."""

    title: str
    table: str
    schema: pa.Schema
    inputs: Inputs
    facts: int
    batches: Iterator[pa.RecordBatch]
    configuration: dict[str, Any]

    def carry_out(self, folder: ResultFolder, quiet: bool = False, keep: int = 0) -> RunSummary:
        """Compute the run into its table in ``folder``; the first ``keep`` facts' batches are kept for figures.

        Whatever ends it early, the facts finished by then are in the table.
        """
        first: list[pa.RecordBatch] = []
        finished = 0
        started = time.monotonic()
        with (
            shown_progress(Console(), self.title, quiet=quiet) as progress,
            folder.table(self.table, self.schema) as table,
        ):
            progress(0, self.facts)
            for batch in self.batches:
                table.write(batch)
                if finished < keep:
                    first.append(batch)
                finished += 1
                progress(finished, self.facts)
        return RunSummary(folder.path / self.table, finished, table.rows, time.monotonic() - started, tuple(first))


def prepare_tracing(source: SourceOptions, choice: TracingOptions, sampling: SamplingOptions) -> TableRun:
    """Causal tracing, plain or severed."""
    spec = _trace_spec(choice, sampling)
    inputs = open_inputs(source)
    run = inputs.used(TraceRun.of(inputs.session, inputs.every, spec, inputs.on_error, source.limit))
    noise: dict[str, Any] = {"replace_noise": choice.replace_noise, "dof": choice.dof}
    noise |= {"sigma_given": sampling.sigma} if spec.noise.kind in SCALED_NOISES else {"sigma": None}
    if isinstance(spec.noise, TextNoise):
        digest = hashlib.sha256("\n".join(spec.noise.texts).encode()).hexdigest()
        noise |= {"noise_texts": str(choice.noise_texts), "noise_texts_sha256": digest}
    return _table_run("trace", "tracing", inputs, run, {**run.spec.configuration, **noise})


def tracing_plan(source: SourceOptions, choice: TracingOptions, sampling: SamplingOptions) -> tuple[Inputs, TracePlan]:
    """The plan of that tracing."""
    spec = _trace_spec(choice, sampling)
    inputs = open_inputs(source)
    run = inputs.used(TraceRun.of(inputs.session, inputs.every, spec, inputs.on_error, source.limit))
    return inputs, run.plan()


def prepare_zeroing(source: SourceOptions, choice: ZeroingOptions) -> TableRun:
    """Representation zeroing."""
    spec = ZeroSpec(
        states=as_states(choice.state or ["mlp:5"]),
        target=choice.target,  # type: ignore[arg-type]
        tokens=parse_tokens(choice.tokens),
    )
    inputs = open_inputs(source)
    run = inputs.used(TraceRun.of(inputs.session, inputs.facts, spec, inputs.on_error))
    return _table_run("zero", "zeroing", inputs, run, run.spec.configuration)


def prepare_gradients(source: SourceOptions, choice: IntegrationOptions, sampling: SamplingOptions) -> TableRun:
    """Integrated gradients."""
    spec = GradientSpec(
        kinds=tuple(choice.kind or KINDS),
        steps=choice.steps,
        baseline=choice.baseline,  # type: ignore[arg-type]
        target=choice.target,  # type: ignore[arg-type]
        tokens=parse_tokens(choice.tokens),
        **vars(sampling),
    )
    if choice.baseline == "zero" and sampling != SamplingOptions():
        raise ExperimentError("samples, sigma and seed are of the corrupted run; they go with --baseline corrupted")
    inputs = open_inputs(source)
    run = inputs.used(GradientRun.of(inputs.session, inputs.every, spec, inputs.on_error, source.limit))
    noise: dict[str, Any] = {"samples": None, "sigma": None, "seed": None}
    if spec.baseline == "corrupted":
        noise = {"sigma_given": sampling.sigma}
    return _table_run("gradients", "integrating gradients", inputs, run, {**run.spec.configuration, **noise})


def parse_tokens(tokens: str) -> str | tuple[int, ...]:
    """Indices, or the name of a choice."""
    try:
        return tuple(int(index) for index in tokens.split(","))
    except ValueError:
        return tokens


def _trace_spec(choice: TracingOptions, sampling: SamplingOptions) -> TraceSpec:
    """The options, which make sense together."""
    names = choice.state or (["hidden:1"] if choice.sever else [f"{kind}:{window}" for kind, window in DEFAULT_STATES])
    texts = _noise_texts(choice)
    noise: dict[str, Any] = {"kind": choice.noise, "replace": choice.replace_noise, "dof": choice.dof}
    return TraceSpec(
        states=as_states(names),
        target=choice.target,  # type: ignore[arg-type]
        tokens=parse_tokens(choice.tokens),
        joint=choice.joint,
        noise=TextNoise(texts=tuple(texts), **noise) if texts else Noise(**noise),
        extra_tokens=choice.extra_tokens,
        sever=choice.sever,  # type: ignore[arg-type]
        compat=choice.compat,  # type: ignore[arg-type]
        **vars(sampling),
    )


def _noise_texts(choice: TracingOptions) -> list[str]:
    """The running text that the noise is to resemble, where it is of that kind."""
    shaped = choice.noise in ("multivariate", "t")
    if shaped != (choice.noise_texts is not None):
        if shaped:
            raise ExperimentError(
                f"the noise {choice.noise!r} resembles the embeddings of running text; give some with --noise-texts"
            )
        raise ExperimentError(f"--noise-texts goes with the noise multivariate or t, not with {choice.noise!r}")
    if choice.noise == "t" and choice.dof is None:
        raise ExperimentError("the noise 't' needs degrees of freedom; give some with --dof, such as 5")
    if choice.noise_texts is None:
        return []
    texts = [line for line in read_text(choice.noise_texts).splitlines() if line.strip()]
    if not texts:
        raise ExperimentError(f"{choice.noise_texts} holds no text; give running text, one text a line")
    return texts


def _table_run(
    command: str, title: str, inputs: Inputs, run: TraceRun | GradientRun, options: dict[str, Any]
) -> TableRun:
    gradients = isinstance(run, GradientRun)
    return TableRun(
        title=title,
        table="gradients" if gradients else "traces",
        schema=GRADIENT_SCHEMA if gradients else TRACE_SCHEMA,
        inputs=inputs,
        facts=len(run.facts),
        batches=run.batches(),
        configuration={"command": command, **inputs.configuration, **options},
    )
