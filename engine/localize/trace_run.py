"""Facts made ready to be traced or zeroed: what runs for each, what that takes, and the table that comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from causalcone.engine.facts import EncodedFact, Fact, OnError, Skipped, token_texts
from causalcone.engine.localize.causal_tracing import TOGETHER, CausalTracing, TraceGrid, Zeroing, counterfactual_prompt
from causalcone.engine.localize.options import Progress, TraceSpec, ZeroSpec, choose_tokens
from causalcone.engine.localize.states import State
from causalcone.engine.noise import SCALED_NOISES, NoiseStream, parse_sigma
from causalcone.engine.plan.cost import forward_flops
from causalcone.engine.plan.interventions import CLEAN, CORRUPTED
from causalcone.engine.run.runner import Result, Trial
from causalcone.engine.run.session import Session
from causalcone.engine.schemas import TRACE_SCHEMA

pa.array([])  # loads pandas, where it is installed: better with the other imports than in the middle of a trace


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


@dataclass(frozen=True, kw_only=True)
class TraceRun:
    """Facts with a trial and its table for each, run with so many samples of the noise.

    spec: resolved for the session's model, with the noise level as a number. skipped: facts that cannot be used.
    """

    session: Session
    spec: TraceSpec | ZeroSpec
    method: str
    facts: list[EncodedFact]
    trials: list[Trial]
    grids: list[TraceGrid]
    skipped: list[Skipped]
    samples: int = 1
    noise: NoiseStream | None = None

    @classmethod
    def tracing(
        cls, session: Session, facts: Sequence[Fact], spec: TraceSpec, on_error: OnError, limit: int | None = None
    ) -> TraceRun:
        """Causal tracing of facts; of the first ``limit``, with a noise level that is of all of them."""
        spec = spec.resolved(session)
        kind = spec.corruption.kind

        def ready(fact: EncodedFact) -> EncodedFact:
            choose_tokens(spec.tokens, len(fact.prompt), fact.span, fact.fact.id)
            if kind != "counterfactual":
                return fact
            return replace(fact, counterfactual=counterfactual_prompt(fact, session.tokenizer, session.sizes))

        level_of, traced = facts_of_level(facts, limit, spec.sigma if kind in SCALED_NOISES else 0.0)
        encoded, skipped = session.encode(level_of, spec.target, on_error, ready)
        sigma = 0.0
        if encoded and kind in SCALED_NOISES:
            sigma = session.noise_level(spec.sigma, [each.fact for each in encoded])
            spec = replace(spec, sigma=sigma)
        encoded = [each for each in encoded if each.fact.id in traced]
        method = CausalTracing(spec, session.sizes.depth)
        pairs = [method.trial(fact) for fact in encoded]
        noise = NoiseStream(spec.corruption, sigma, spec.seed, method.samples, session.sizes.hidden, method.draws)
        return cls(
            session=session,
            spec=spec,
            method=spec.method,
            facts=encoded,
            trials=[trial for trial, _ in pairs],
            grids=[grid for _, grid in pairs],
            skipped=skipped,
            samples=method.samples,
            noise=noise,
        )

    @classmethod
    def zeroing(cls, session: Session, facts: Sequence[Fact], spec: ZeroSpec, on_error: OnError) -> TraceRun:
        """Representation zeroing of facts."""
        spec = spec.resolved(session)

        def ready(fact: EncodedFact) -> EncodedFact:
            choose_tokens(spec.tokens, len(fact.prompt), fact.span, fact.fact.id)
            return fact

        encoded, skipped = session.encode(facts, spec.target, on_error, ready)
        method = Zeroing(spec, session.sizes.depth)
        pairs = [method.trial(fact) for fact in encoded]
        return cls(
            session=session,
            spec=spec,
            method="zero",
            facts=encoded,
            trials=[trial for trial, _ in pairs],
            grids=[grid for _, grid in pairs],
            skipped=skipped,
        )

    def batches(self, progress: Progress | None = None) -> Iterator[pa.RecordBatch]:
        """One batch per fact, in order; the call itself refuses memory that is too little."""
        results = self.session.run(self.trials, self.samples, self.noise)
        return self._batches(results, progress or (lambda done, of: None))

    def _batches(self, results: Iterator[tuple[int, Result]], report: Progress) -> Iterator[pa.RecordBatch]:
        report(0, len(self.facts))
        for number, result in results:
            fact = self.facts[number]
            texts = token_texts(fact.prompt, self.session.tokenizer)
            yield _trace_batch(fact, self.method, self.grids[number], self.spec.states, texts, result.log_p)
            report(number + 1, len(self.facts))

    def plan(self) -> TracePlan:
        """What ``batches`` would compute."""
        passes = peak = rows = flops = attention_flops = 0
        for bytes_needed, costs in self.session.costs(self.trials, self.samples, self.noise):
            passes += 1
            peak = max(peak, bytes_needed)
            rows += sum(cost.rows for cost in costs)
            flops += sum(cost.flops for cost in costs)
            attention_flops += sum(cost.attention_flops for cost in costs)
        forwards = 1 if self.method == "restore" else 2
        sizes = self.session.sizes
        naive = sum(
            (1 + self.samples) * (1 + forwards * len(grid.run)) * forward_flops(sizes, len(fact.tokens))
            for fact, grid in zip(self.facts, self.grids, strict=True)
        )
        read = self.session.architecture.read_bytes
        return TracePlan(len(self.facts), passes, rows, flops, attention_flops, naive, peak, read)


def facts_of_level(facts: Sequence[Fact], limit: int | None, sigma: float | str) -> tuple[Sequence[Fact], set[str]]:
    """The facts to be encoded for a noise level, which are all where it is counted in standard deviations, and the ids
    of the first ``limit``."""
    first = facts[:limit]
    return facts if parse_sigma(sigma)[1] else first, {fact.id for fact in first}


def _trace_batch(
    fact: EncodedFact, method: str, grid: TraceGrid, states: Sequence[State], texts: Sequence[str], log_p: np.ndarray
) -> pa.RecordBatch:
    """The table of one fact.

    texts: the text of each prompt token; log_p (J, R): log-probability of the target in each sample of each run.
    ``p_patched_sd`` is the unbiased standard deviation over samples, null where there is one sample; ``p_corrupted`` is
    null where there is no corrupted run, ``token`` and its text where a row is about several tokens together.
    """
    p = np.exp(log_p)
    mean = p.mean(0)
    rows = len(grid.run)
    several, corrupted = len(p) > 1, len(grid.experiment.bases) > 1
    deviation = p.std(0, ddof=1)[grid.run] if several else np.full(rows, np.nan)
    token = pa.array(grid.token, pa.int32(), mask=grid.token == TOGETHER)

    def repeated(value: object, kind: pa.DataType) -> pa.Array:
        return pa.repeat(pa.scalar(value, kind), rows)

    columns = {
        "fact_id": repeated(fact.fact.id, pa.string()),
        "method": repeated(method, pa.string()),
        "kind": pa.array([state.kind for state in states]).take(pa.array(grid.state)),
        "window": pa.array([state.window for state in states], pa.int32()).take(pa.array(grid.state)),
        "layer": pa.array(grid.layer, pa.int32()),
        "token": token,
        "token_text": pa.array(list(texts), pa.string()).take(token),
        "subject_start": repeated(fact.span[0], pa.int32()),
        "subject_end": repeated(fact.span[1], pa.int32()),
        "prompt_tokens": repeated(len(fact.prompt), pa.int32()),
        "p_clean": repeated(mean[CLEAN], pa.float64()),
        "p_corrupted": repeated(mean[CORRUPTED] if corrupted else None, pa.float64()),
        "p_patched": pa.array(mean[grid.run]),
        "p_patched_sd": pa.array(deviation, mask=None if several else np.ones(rows, dtype=bool)),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in TRACE_SCHEMA.names], schema=TRACE_SCHEMA)
