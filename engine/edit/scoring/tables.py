"""Result tables of editing: edits, probes (a row for every prompt of every edit), metrics and texts, as batches."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.scoring.probes import ESSENCE, OTHER, OWN, TARGET, Answer
from causalcone.engine.edit.scoring.scoring import Scored
from causalcone.engine.edit.scoring.written import Written
from causalcone.engine.schemas import EDIT_SCHEMA, METRIC_SCHEMA, PROBE_SCHEMA, PROMPT_KINDS, TEXT_SCHEMA


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


def text_batch(written: Iterable[Written]) -> pa.RecordBatch:
    """The table of texts that models wrote before and after each edit."""
    rows = [
        {
            "edit_id": each.edit.edit_id,
            "prompt_kind": prompt.kind,
            "prompt_index": prompt.index,
            "prompt": prompt.prompt,
            "before": each.before[number],
            "after": None if each.after is None else each.after[number],
        }
        for each in written
        for number, prompt in enumerate(each.prompts)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=TEXT_SCHEMA)


def metric_batch(rows: Iterable[tuple[str, str, float, float | None]]) -> pa.RecordBatch:
    """The table of metrics, from edit, metric, and its values before and after the edit."""
    return pa.RecordBatch.from_pylist(
        [dict(zip(METRIC_SCHEMA.names, row, strict=True)) for row in rows], schema=METRIC_SCHEMA
    )


def _probe_rows(scored: Scored) -> list[dict[str, object]]:
    probes = scored.probes.probes
    numbers: dict[tuple[str, int, Answer], list[int]] = {}
    for number, probe in enumerate(probes):
        numbers.setdefault((probe.kind, probe.index, probe.answer), []).append(number)

    def of(kind: str, index: int, answer: Answer, suffix: str = "") -> dict[str, float | None]:
        """The columns of the likeliest of some answers; its tokens are those of the likeliest before the edit."""
        answers = numbers.get((kind, index, answer), [])
        first = max(answers, key=lambda number: scored.pre.log_p[number], default=None)
        columns: dict[str, float | None] = {
            f"answer_tokens{suffix}": None if first is None else len(probes[first].tokens)
        }
        for name, results in (("pre", scored.pre), ("post", scored.post)):
            log_p = np.array([]) if results is None else results.log_p[answers]
            finite = float(log_p.max()) if log_p.size and np.isfinite(log_p).all() else None
            columns[f"logp_{name}{suffix}"] = finite
            columns[f"p_{name}{suffix}"] = None if finite is None else float(np.exp(finite))
        return columns

    return [
        {
            "edit_id": scored.edit.edit_id,
            "prompt_kind": kind,
            "prompt_index": index,
            **of(kind, index, answer),
            **of(kind, index, OTHER, "_other"),
            "prompt_name": probes[first].name or None,
            "condition": probes[first].held,
        }
        for (kind, index, answer), (first, *_) in numbers.items()
        if kind != ESSENCE and answer == (TARGET if kind in PROMPT_KINDS else OWN)
    ]
