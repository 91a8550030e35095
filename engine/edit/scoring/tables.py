"""Result tables of editing: edits, probes (a row for every prompt of every edit) and metrics, as Arrow batches."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.scoring.probes import OTHER, PROMPT_KINDS, TARGET, Answer
from causalcone.engine.edit.scoring.scoring import Scored
from causalcone.engine.schemas import EDIT_SCHEMA, METRIC_SCHEMA, PROBE_SCHEMA


def edit_batch(edits: Iterable[Edit]) -> pa.RecordBatch:
    """The table of edits.

    Args:
        edits: Edits of any methods, such as ``Editor.rome`` makes.

    Returns:
        A row for each edit, with the columns of ``EDIT_SCHEMA``; a loss that is not finite is null.
    """
    rows = [
        {
            **{name: getattr(edit, name) for name in EDIT_SCHEMA.names},
            "loss": edit.loss if np.isfinite(edit.loss) else None,
        }
        for edit in edits
    ]
    return pa.RecordBatch.from_pylist(rows, schema=EDIT_SCHEMA)


def probe_batch(scored: Iterable[Scored]) -> pa.RecordBatch:
    """The table of probes: probabilities of the problem's target and of the other one, before and after each edit, and
    their logarithms; null where there is no other target, the edit failed, or they are not finite."""
    rows = [row for result in scored for row in _probe_rows(result)]
    return pa.RecordBatch.from_pylist(rows, schema=PROBE_SCHEMA)


def metric_batch(rows: Iterable[tuple[str, str, float, float | None]]) -> pa.RecordBatch:
    """The table of metrics, from edit, metric, and its values before and after the edit."""
    return pa.RecordBatch.from_pylist(
        [dict(zip(METRIC_SCHEMA.names, row, strict=True)) for row in rows], schema=METRIC_SCHEMA
    )


def _probe_rows(scored: Scored) -> list[dict[str, object]]:
    numbers = {(probe.kind, probe.index, probe.answer): n for n, probe in enumerate(scored.probes.probes)}

    def of(kind: str, index: int, answer: Answer, suffix: str = "") -> dict[str, float | None]:
        """The columns of one answer."""
        number = numbers.get((kind, index, answer))
        columns: dict[str, float | None] = {
            f"answer_tokens{suffix}": None if number is None else len(scored.probes.probes[number].tokens)
        }
        for name, results in (("pre", scored.pre), ("post", scored.post)):
            log_p = None if number is None or results is None else float(results.log_p[number])
            finite = log_p if log_p is not None and np.isfinite(log_p) else None
            columns[f"logp_{name}{suffix}"] = finite
            columns[f"p_{name}{suffix}"] = None if finite is None else float(np.exp(finite))
        return columns

    return [
        {
            "edit_id": scored.edit.edit_id,
            "prompt_kind": kind,
            "prompt_index": index,
            **of(kind, index, TARGET),
            **of(kind, index, OTHER, "_other"),
        }
        for kind, index, answer in numbers
        if kind in PROMPT_KINDS and answer == TARGET
    ]
