"""Runs that localize facts, prepared from the options of a command: all is checked, and nothing computed yet."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from causalcone.engine.errors import ExperimentError
from causalcone.engine.localize.branches import check_tokens
from causalcone.engine.localize.options import DEFAULT_STATES, GradientSpec, TraceSpec, check_target
from causalcone.engine.localize.states import KINDS, MOST_HEADS, State, as_states
from causalcone.engine.localize.tracer import TracePlan
from causalcone.engine.noise import SCALED_NOISES, Noise
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
from causalcone.runners.results.table_run import TableRun


@dataclass(frozen=True)
class Prepared:
    """A run ready to be carried out, and the configuration to keep beside its results."""

    inputs: Inputs
    run: TableRun
    configuration: dict[str, Any]


def prepare_tracing(source: SourceOptions, choice: TracingOptions, sampling: SamplingOptions) -> Prepared:
    """Causal tracing, plain or severed."""
    inputs, spec, texts = _trace_spec(source, choice, sampling)
    options = {"on_error": inputs.on_error, **vars(spec)}
    batches, facts = inputs.started(lambda: inputs.tracer.stream(inputs.facts, **options))
    noise = {"noise": spec.corruption.kind, "replace_noise": choice.replace_noise, "dof": choice.dof}
    if spec.corruption.kind in SCALED_NOISES:
        noise |= {"sigma_given": sampling.sigma}
    else:
        noise |= {"sigma": None}
    if texts:
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        noise |= {"noise_texts": str(choice.noise_texts), "noise_texts_sha256": digest}
    configuration = _configuration("trace", inputs, {**vars(spec), **noise})
    return Prepared(inputs, TableRun("tracing", "traces", TRACE_SCHEMA, facts, batches), configuration)


def tracing_plan(source: SourceOptions, choice: TracingOptions, sampling: SamplingOptions) -> tuple[Inputs, TracePlan]:
    """The plan of that tracing."""
    inputs, spec, _ = _trace_spec(source, choice, sampling)
    plan, _ = inputs.started(lambda: inputs.tracer.plan(inputs.facts, on_error=inputs.on_error, **vars(spec)))
    return inputs, plan


def prepare_zeroing(source: SourceOptions, choice: ZeroingOptions) -> Prepared:
    """Representation zeroing."""
    as_states(choice.state or ["mlp:5"], MOST_HEADS)
    tokens = parse_tokens(choice.tokens)
    check_target(choice.target)
    check_tokens(tokens)
    inputs = open_inputs(source)
    states = _states(choice.state or ["mlp:5"], inputs)
    options: dict[str, Any] = {"states": states, "target": choice.target, "tokens": tokens}
    start = {"on_error": inputs.on_error, **options}
    batches, facts = inputs.started(lambda: inputs.tracer.stream_zero(inputs.facts, **start))
    run = TableRun("zeroing", "traces", TRACE_SCHEMA, facts, batches)
    return Prepared(inputs, run, _configuration("zero", inputs, options))


def prepare_gradients(source: SourceOptions, choice: IntegrationOptions, sampling: SamplingOptions) -> Prepared:
    """Integrated gradients."""
    spec = GradientSpec(
        tuple(choice.kind or KINDS),
        choice.steps,
        choice.baseline,
        choice.target,
        parse_tokens(choice.tokens),
        sampling.samples,
        sampling.sigma,
        sampling.seed,
    )
    if choice.baseline == "zero" and sampling != SamplingOptions():
        raise ExperimentError("samples, sigma and seed are of the corrupted run; they go with --baseline corrupted")
    inputs = open_inputs(source)
    options = vars(spec)
    noise: dict[str, Any] = {"samples": None, "sigma": None, "seed": None}
    if spec.baseline == "corrupted":
        options = {**options, "sigma": inputs.noise_level(sampling.sigma)}
        noise = {"sigma_given": sampling.sigma}
    start = {"on_error": inputs.on_error, **options}
    batches, facts = inputs.started(lambda: inputs.tracer.stream_integrated_gradients(inputs.facts, **start))
    run = TableRun("integrating gradients", "gradients", GRADIENT_SCHEMA, facts, batches)
    return Prepared(inputs, run, _configuration("gradients", inputs, {**options, **noise}))


def parse_tokens(tokens: str) -> str | tuple[int, ...]:
    """Indices, or the name of a choice."""
    try:
        return tuple(int(index) for index in tokens.split(","))
    except ValueError:
        return tokens


def _trace_spec(
    source: SourceOptions, choice: TracingOptions, sampling: SamplingOptions
) -> tuple[Inputs, TraceSpec, list[str]]:
    """Model and facts, read once the options are known to make sense together, the options, and the noise's texts."""
    names = choice.state or (["hidden:1"] if choice.sever else [f"{kind}:{window}" for kind, window in DEFAULT_STATES])

    def spec(states: tuple[State, ...], sigma: float | str, noise: Noise) -> TraceSpec:
        return TraceSpec(
            states,
            sampling.samples,
            sigma,
            sampling.seed,
            choice.target,
            parse_tokens(choice.tokens),
            choice.joint,
            noise,
            choice.extra_tokens,
            choice.sever,
            choice.compat,
        )

    texts = _noise_texts(choice)
    # of no model's size: this only refuses options that no model can have
    stand_in = {"mean": [0.0], "covariance": [[1.0]]} if texts else {}
    noise = Noise(choice.noise, choice.replace_noise, choice.dof, **stand_in)
    spec(as_states(names, MOST_HEADS), sampling.sigma, noise)

    inputs = open_inputs(source)
    states = _states(names, inputs)
    if texts:
        noise = inputs.tracer.embedding_noise(texts, choice.dof, choice.replace_noise)
    sigma = inputs.noise_level(sampling.sigma) if noise.kind in SCALED_NOISES else sampling.sigma
    return inputs, spec(states, sigma, noise), texts


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


def _states(names: list[str], inputs: Inputs) -> tuple[State, ...]:
    return as_states(names, inputs.tracer.session.sizes.heads)


def _configuration(command: str, inputs: Inputs, options: dict[str, Any]) -> dict[str, Any]:
    if "states" in options:
        options = {**options, "states": [str(state) for state in options["states"]]}
    return {"command": command, **inputs.configuration, **options}
