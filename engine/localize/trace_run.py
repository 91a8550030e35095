"""Facts made ready to be traced or zeroed: what runs for each, what that takes, and the table that comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow as pa

from causalcone.engine.encoding import EncodedFact, token_texts
from causalcone.engine.facts import Fact, OnError, Skipped
from causalcone.engine.localize.causal_tracing import (
    TOGETHER,
    CausalTracing,
    TraceGrid,
    Zeroing,
    counterfactual_prompt,
    with_counterfactual_subjects,
)
from causalcone.engine.localize.options import CheckedSpec, Progress, TraceSpec, ZeroSpec, choose_tokens
from causalcone.engine.noise import SCALED_NOISES, NoiseStream, parse_sigma
from causalcone.engine.plan.cost import forward_flops
from causalcone.engine.plan.interventions import CLEAN, CORRUPTED
from causalcone.engine.run.runner import Trial
from causalcone.engine.run.session import Session
from causalcone.engine.schemas import TRACE_SCHEMA

if TYPE_CHECKING:
    from causalcone.analysis.prompt_map import PromptMap

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
class FactsRun:
    """Facts made ready for a method that makes a table. spec: with the noise level as a number; skipped: left out;
    noise: of the corrupted run, None where there is none."""

    name: ClassVar[str]
    schema: ClassVar[pa.Schema]
    session: Session
    spec: CheckedSpec
    facts: list[EncodedFact]
    skipped: list[Skipped]
    noise: NoiseStream | None

    def tables(self) -> Iterator[pa.RecordBatch]:
        """One batch per fact, in order; the call itself refuses memory that is too little."""
        raise NotImplementedError

    def batches(self, progress: Progress | None = None) -> Iterator[pa.RecordBatch]:
        return _reported(self.tables(), len(self.facts), progress or (lambda done, of: None))

    def drawn(self, table: pa.Table) -> PromptMap:
        """The map of the only fact of the run and its table."""
        from causalcone.analysis.prompt_map import PromptMap  # drawing is not the engine's, and loaded when asked for

        (fact,), clean_and_corrupted = self.facts, self.probabilities(table)
        likeliest = " (the likeliest token)" if self.spec.target == "argmax" else ""
        p = ", ".join(f"{name} {value:.3g}" for name, value in clean_and_corrupted.items() if value is not None)
        noise = ""
        if self.noise is not None:
            level = f" of level {self.noise.sigma:.3g}" if self.noise.noise.kind in SCALED_NOISES else ""
            noise = f" ({self.noise.noise.kind} noise{level} on the subject, {self.noise.samples} samples)"
        head = f"{fact.fact.text} -> {fact.fact.target_true}{likeliest}", p + noise
        return PromptMap.of(table, head, token_texts(fact.prompt, self.session.tokenizer), fact.span)

    def probabilities(self, table: pa.Table) -> dict[str, float | None]:
        """Of the first fact's target in the clean and, where there is one, the corrupted run."""
        return {name: table[name][0].as_py() for name in ("p_clean", "p_corrupted")}

    @classmethod
    def table(cls, batches: Iterable[pa.RecordBatch]) -> pa.Table:
        return pa.Table.from_batches(list(batches), schema=cls.schema)


def _reported(batches: Iterator[pa.RecordBatch], count: int, report: Progress) -> Iterator[pa.RecordBatch]:
    report(0, count)
    for done, batch in enumerate(batches, start=1):
        yield batch
        report(done, count)


def encode_facts(
    session: Session,
    facts: Sequence[Fact],
    spec: CheckedSpec,
    sigma: float | str | None,
    on_error: OnError,
    limit: int | None,
) -> tuple[list[EncodedFact], list[Skipped], float]:
    """The first ``limit`` facts, those that cannot be used, and the noise level, which is of all facts where ``sigma``
    counts standard deviations; 0 without ``sigma``."""
    counterfactual = isinstance(spec, TraceSpec) and spec.corruption.kind == "counterfactual"

    if counterfactual:
        facts = with_counterfactual_subjects(facts, session.prompts)

    def ready(fact: EncodedFact) -> EncodedFact:
        choose_tokens(spec.tokens, len(fact.prompt), fact.span, fact.fact.id)
        if not counterfactual:
            return fact
        return replace(fact, counterfactual=counterfactual_prompt(fact, session.prompts))

    first = facts[:limit]
    of_level = first if sigma is None or not parse_sigma(sigma)[1] else facts
    encoded, skipped = session.encode(of_level, spec.target, on_error, ready)
    level = 0.0 if sigma is None or not encoded else session.noise_level(sigma, [fact.fact for fact in encoded])
    ids = {fact.id for fact in first}
    return [fact for fact in encoded if fact.fact.id in ids], skipped, level


@dataclass(frozen=True, kw_only=True)
class TraceRun(FactsRun):
    """Causal tracing or zeroing, a trial and its table for each fact; spec: resolved for the session's model."""

    name, schema = "traces", TRACE_SCHEMA
    spec: TraceSpec | ZeroSpec
    trials: list[Trial]
    grids: list[TraceGrid]
    samples: int

    @classmethod
    def of(
        cls,
        session: Session,
        facts: Sequence[Fact],
        spec: TraceSpec | ZeroSpec,
        on_error: OnError,
        limit: int | None = None,
    ) -> TraceRun:
        """Of the first ``limit`` facts, with a noise level that is of all of them."""
        spec, sizes, noise = spec.resolved(session), session.sizes, None
        sigma = spec.sigma if isinstance(spec, TraceSpec) and spec.corruption.kind in SCALED_NOISES else None
        encoded, skipped, level = encode_facts(session, facts, spec, sigma, on_error, limit)
        method: CausalTracing | Zeroing
        if isinstance(spec, TraceSpec):
            spec = spec if sigma is None else replace(spec, sigma=level)
            method = CausalTracing(spec, sizes.depth)
            noise = NoiseStream(spec.corruption, level, spec.seed, method.samples, sizes.hidden, method.draws)
        else:
            method = Zeroing(spec, sizes.depth)
        pairs = [method.trial(fact) for fact in encoded]
        return cls(
            session=session,
            spec=spec,
            facts=encoded,
            skipped=skipped,
            trials=[trial for trial, _ in pairs],
            grids=[grid for _, grid in pairs],
            samples=method.samples,
            noise=noise,
        )

    def tables(self) -> Iterator[pa.RecordBatch]:
        results = self.session.run(self.trials, self.samples, self.noise)
        return (self._table(number, result.log_p) for number, result in results)

    def plan(self) -> TracePlan:
        passes = peak = rows = flops = attention_flops = 0
        for bytes_needed, costs in self.session.costs(self.trials, self.samples, self.noise):
            passes += 1
            peak = max(peak, bytes_needed)
            rows += sum(cost.rows for cost in costs)
            flops += sum(cost.flops for cost in costs)
            attention_flops += sum(cost.attention_flops for cost in costs)
        forwards = 1 if self.spec.method == "restore" else 2
        sizes = self.session.sizes
        naive = sum(
            (1 + self.samples) * (1 + forwards * len(grid.run)) * forward_flops(sizes, len(fact.tokens))
            for fact, grid in zip(self.facts, self.grids, strict=True)
        )
        read = self.session.architecture.read_bytes
        return TracePlan(len(self.facts), passes, rows, flops, attention_flops, naive, peak, read)

    def _table(self, number: int, log_p: np.ndarray) -> pa.RecordBatch:
        """The table of one fact, of the log-probability of its target in each sample of each run (J, R).
        ``p_patched_sd`` is the unbiased standard deviation over samples, null where there is one sample; null are
        those of the corrupted run where there is none, and ``token`` and its text where a row is about several
        tokens."""
        fact, grid, states = self.facts[number], self.grids[number], self.spec.states
        texts = token_texts(fact.prompt, self.session.tokenizer)
        p = np.exp(log_p)
        mean, log_mean = p.mean(0), np.logaddexp.reduce(log_p) - np.log(len(log_p))
        rows = len(grid.run)
        several, corrupted = len(p) > 1, len(grid.experiment.bases) > 1
        deviation = p.std(0, ddof=1)[grid.run] if several else np.full(rows, np.nan)
        token = pa.array(grid.token, pa.int32(), mask=grid.token == TOGETHER)

        def repeated(value: object, kind: pa.DataType) -> pa.Array:
            return pa.repeat(pa.scalar(value, kind), rows)

        columns = {
            "fact_id": repeated(fact.fact.id, pa.string()),
            "method": repeated(self.spec.method, pa.string()),
            "kind": pa.array([state.kind for state in states]).take(pa.array(grid.state)),
            "window": pa.array([state.window for state in states], pa.int32()).take(pa.array(grid.state)),
            "layer": pa.array(grid.layer, pa.int32()),
            "token": token,
            "token_text": pa.array(texts, pa.string()).take(token),
            "subject_start": repeated(fact.span[0], pa.int32()),
            "subject_end": repeated(fact.span[1], pa.int32()),
            "prompt_tokens": repeated(len(fact.prompt), pa.int32()),
            "p_clean": repeated(mean[CLEAN], pa.float64()),
            "p_corrupted": repeated(mean[CORRUPTED] if corrupted else None, pa.float64()),
            "p_patched": pa.array(mean[grid.run]),
            "p_patched_sd": pa.array(deviation, mask=None if several else np.ones(rows, dtype=bool)),
            "answer_tokens": repeated(max(1, len(fact.target)), pa.int32()),
            "logp_clean": repeated(log_mean[CLEAN], pa.float64()),
            "logp_corrupted": repeated(log_mean[CORRUPTED] if corrupted else None, pa.float64()),
            "logp_patched": pa.array(log_mean[grid.run]),
        }
        return pa.RecordBatch.from_arrays([columns[name] for name in TRACE_SCHEMA.names], schema=TRACE_SCHEMA)
