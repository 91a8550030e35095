"""Result tables: the fixed columns of traces, as Arrow batches of whole facts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from causalcone.engine.facts import EncodedFact
from causalcone.engine.localize.branches import TOGETHER, TraceGrid
from causalcone.engine.localize.gradients import Attribution
from causalcone.engine.localize.states import State
from causalcone.engine.plan.interventions import CLEAN, CORRUPTED, SITES
from causalcone.engine.schemas import GRADIENT_SCHEMA, TRACE_SCHEMA

pa.array([])  # loads pandas, where it is installed: better with the other imports than in the middle of a trace


def gradient_batch(fact_id: str, attribution: Attribution) -> pa.RecordBatch:
    """The table of one fact's integrated gradients."""
    a = attribution
    columns = [
        pa.repeat(pa.scalar(fact_id), len(a.layer)),
        pa.array([SITES[site] for site in a.site]),
        pa.array(a.layer, pa.int32()),
        pa.array(a.token, pa.int32()),
        *map(pa.array, (a.norm, a.total, a.gap)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=GRADIENT_SCHEMA)


def trace_batch(
    fact: EncodedFact,
    method: str,
    branches: TraceGrid,
    states: Sequence[State],
    texts: Sequence[str],
    log_p: np.ndarray,
) -> pa.RecordBatch:
    """The table of one fact.

    texts: the text of each prompt token; log_p (J, R): log-probability of the target in each sample of each run.
    ``p_patched_sd`` is the unbiased standard deviation over samples, null where there is one sample; ``p_corrupted`` is
    null where there is no corrupted run, ``token`` and its text where a row is about several tokens together.
    """
    p = np.exp(log_p)
    mean = p.mean(0)
    rows = len(branches.run)
    several, corrupted = len(p) > 1, len(branches.experiment.bases) > 1
    deviation = p.std(0, ddof=1)[branches.run] if several else np.full(rows, np.nan)
    token = pa.array(branches.token, pa.int32(), mask=branches.token == TOGETHER)

    def repeated(value: object, kind: pa.DataType) -> pa.Array:
        return pa.repeat(pa.scalar(value, kind), rows)

    columns = {
        "fact_id": repeated(fact.fact.id, pa.string()),
        "method": repeated(method, pa.string()),
        "kind": pa.array([state.kind for state in states]).take(pa.array(branches.state)),
        "window": pa.array([state.window for state in states], pa.int32()).take(pa.array(branches.state)),
        "layer": pa.array(branches.layer, pa.int32()),
        "token": token,
        "token_text": pa.array(list(texts), pa.string()).take(token),
        "subject_start": repeated(fact.span[0], pa.int32()),
        "subject_end": repeated(fact.span[1], pa.int32()),
        "prompt_tokens": repeated(len(fact.prompt), pa.int32()),
        "p_clean": repeated(mean[CLEAN], pa.float64()),
        "p_corrupted": repeated(mean[CORRUPTED] if corrupted else None, pa.float64()),
        "p_patched": pa.array(mean[branches.run]),
        "p_patched_sd": pa.array(deviation, mask=None if several else np.ones(rows, dtype=bool)),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in TRACE_SCHEMA.names], schema=TRACE_SCHEMA)
