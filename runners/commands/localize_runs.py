"""Runs that localize facts, prepared from the options of a command: all is checked, and nothing computed yet."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from causalcone.analysis.prompt_map import PromptMap
from causalcone.analysis.tables.traces import AnswerScore, read_gradients, read_traces
from causalcone.engine.encoding import prompt_record
from causalcone.engine.errors import ExperimentError
from causalcone.engine.localize.gradients import GradientRun
from causalcone.engine.localize.options import DEFAULT_STATES, GradientSpec, TraceSpec, ZeroSpec
from causalcone.engine.localize.states import KINDS, as_states
from causalcone.engine.localize.trace_run import FactsRun, TracePlan, TraceRun
from causalcone.engine.noise import SCALED_NOISES, Noise, TextNoise
from causalcone.engine.schemas import GRADIENT_SCHEMA
from causalcone.runners.checked_files import read_text
from causalcone.runners.commands.shared import open_results, place_of, show
from causalcone.runners.inputs.inputs import Inputs, open_inputs
from causalcone.runners.options import (
    IntegratedOptions,
    IntegrationOptions,
    PromptOutputOptions,
    SamplingOptions,
    TracedOptions,
    TracingOptions,
    ZeroingOptions,
)
from causalcone.runners.show.progress import shown_progress


@dataclass(frozen=True, kw_only=True)
class TableRun:
    """A run that makes one table, its batches, and the configuration to keep beside it."""

    title: str
    inputs: Inputs
    run: FactsRun
    batches: Iterator[pa.RecordBatch]
    configuration: dict[str, Any]

    @classmethod
    def of(cls, command: str, title: str, inputs: Inputs, run: FactsRun, options: dict[str, Any]) -> TableRun:
        """Refuses memory that is too little."""
        prompts = vars(inputs.session.prompts.form) | prompt_record(run.facts)
        configuration = {"command": command, **inputs.configuration, **options, "prompts": prompts}
        return cls(title=title, inputs=inputs, run=run, batches=run.batches(), configuration=configuration)

    def carry_out(
        self,
        output: PromptOutputOptions,
        tables: Callable[[Path], Iterable[Any]],
        draw: Callable[[Path, list[pa.RecordBatch], Path], Iterable[Path]],
        keep: int = 0,
        answer_score: AnswerScore = "product",
    ) -> None:
        """Compute the run into its table, draw figures into a folder, of the table and of the batches of the first
        ``keep`` facts, and show tables, or a single prompt's map. Whatever ends it early, the facts finished by then
        are in the table."""
        name, total, finished, single = self.run.name, len(self.run.facts), 0, self.inputs.single
        first: list[pa.RecordBatch] = []
        started = time.monotonic()
        with place_of(output) as place:
            with open_results(output, place, self.configuration, name) as folder:
                progressing = shown_progress(Console(), self.title, quiet=output.quiet or single)
                with progressing as progress, folder.table(name, self.run.schema) as table:
                    progress(0, total)
                    for finished, batch in enumerate(self.batches, start=1):
                        table.write(batch)
                        if finished <= keep:
                            first.append(batch)
                        progress(finished, total)
                seconds, path = time.monotonic() - started, place / name
                figures = draw(output.out or Path(), first, path)
            folder.finish(facts=finished, rows=table.rows, seconds=round(seconds, 3))
            if not output.quiet:
                shown = [self._map(path, answer_score)] if single else tables(path)
                done = f"{table.rows} rows in {seconds:.1f} s"
                if not single:
                    done = f"{finished} facts, {done} ({finished / seconds:.2f} facts/s)"
                show(shown, done if output.out is None else f"{done} -> {path}", figures)

    def _map(self, path: Path, answer_score: AnswerScore) -> PromptMap:
        """A single prompt's map of its table."""
        gradients = self.run.schema is GRADIENT_SCHEMA
        table = read_gradients(path) if gradients else read_traces(path, answer_score)
        return self.run.drawn(table.to_arrow())


def prepare_tracing(source: TracedOptions, choice: TracingOptions, sampling: SamplingOptions) -> TableRun:
    inputs, spec, run = _tracing(source, choice, sampling)
    noise: dict[str, Any] = {"replace_noise": choice.replace_noise, "dof": choice.dof}
    noise |= {"sigma_given": sampling.sigma} if spec.noise.kind in SCALED_NOISES else {"sigma": None}
    if isinstance(spec.noise, TextNoise):
        digest = hashlib.sha256("\n".join(spec.noise.texts).encode()).hexdigest()
        noise |= {"noise_texts": str(choice.noise_texts), "noise_texts_sha256": digest}
    return TableRun.of("trace", "tracing", inputs, run, {**run.spec.configuration, **noise})


def tracing_plan(source: TracedOptions, choice: TracingOptions, sampling: SamplingOptions) -> tuple[Inputs, TracePlan]:
    inputs, _, run = _tracing(source, choice, sampling)
    return inputs, run.plan()


def prepare_zeroing(source: TracedOptions, choice: ZeroingOptions) -> TableRun:
    spec = ZeroSpec(
        states=as_states(choice.state or ["mlp:5"]),
        target=source.target(choice.target),  # type: ignore[arg-type]
        tokens=parse_tokens(choice.tokens),
    )
    inputs = open_inputs(source)
    run = inputs.used(TraceRun.of(inputs.session, inputs.facts, spec, inputs.on_error))
    return TableRun.of("zero", "zeroing", inputs, run, run.spec.configuration)


def prepare_gradients(source: IntegratedOptions, choice: IntegrationOptions, sampling: SamplingOptions) -> TableRun:
    spec = GradientSpec(
        kinds=tuple(choice.kind or KINDS),
        steps=choice.steps,
        baseline=choice.baseline,  # type: ignore[arg-type]
        target=source.target(choice.target),  # type: ignore[arg-type]
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
    return TableRun.of("gradients", "integrating gradients", inputs, run, {**run.spec.configuration, **noise})


def parse_tokens(tokens: str) -> str | tuple[int, ...]:
    """Indices, or the name of a choice."""
    try:
        return tuple(int(index) for index in tokens.split(","))
    except ValueError:
        return tokens


def _tracing(
    source: TracedOptions, choice: TracingOptions, sampling: SamplingOptions
) -> tuple[Inputs, TraceSpec, TraceRun]:
    """Model and facts, the options, which make sense together, and the run."""
    names = choice.state or (["hidden:1"] if choice.sever else [f"{kind}:{window}" for kind, window in DEFAULT_STATES])
    texts = _noise_texts(choice)
    noise: dict[str, Any] = {"kind": choice.noise, "replace": choice.replace_noise, "dof": choice.dof}
    spec = TraceSpec(
        states=as_states(names),
        target=source.target(choice.target),  # type: ignore[arg-type]
        tokens=parse_tokens(choice.tokens),
        joint=choice.joint,
        noise=TextNoise(texts=tuple(texts), **noise) if texts else Noise(**noise),
        extra_tokens=choice.extra_tokens,
        sever=choice.sever,  # type: ignore[arg-type]
        compat=choice.compat,  # type: ignore[arg-type]
        **vars(sampling),
    )
    inputs = open_inputs(source)
    return inputs, spec, inputs.used(TraceRun.of(inputs.session, inputs.every, spec, inputs.on_error, source.limit))


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
