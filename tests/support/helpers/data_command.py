"""What tests of ``causalcone data`` share: records of every schema, and writing them to files of every kind."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from helpers.fact_records import COUNTERFACT

ZSRE: dict[str, Any] = {
    "subject": "Bo",
    "src": "Who taught Bo?",
    "rephrase": "By whom was Bo taught?",
    "answers": ["Ida Falk"],
    "loc": "nq question: where do swallows go",
    "loc_ans": "Africa",
}
KNOWN: dict[str, Any] = {
    "known_id": 5,
    "prompt": "Rome lies in",
    "subject": "Rome",
    "attribute": "Italy",
    "relation_id": "P17",
}
OWN: dict[str, Any] = {"id": "a", "prompt": "{} plays", "subject": "Ann Lee", "target_true": "tennis"}
KNOWN_AS_REWRITE: dict[str, Any] = {
    "prompt": "{} lies in",
    "subject": "Rome",
    "target_true": {"str": "Italy"},
    "relation_id": "P17",
}
TWO: dict[str, list[dict[str, Any]]] = {
    "counterfact": [COUNTERFACT, {**COUNTERFACT, "case_id": 18}],
    "zsre": [ZSRE, {**ZSRE, "subject": "Ek", "src": "Who taught Ek?", "answers": ["Al", "Alf"]}],
    "known": [KNOWN, {**KNOWN, "known_id": 6}],
    "own": [OWN, {**OWN, "id": "b", "target_new": "golf", "paraphrase_prompts": ["It is said that Ann Lee plays"]}],
}
"""Two records of every schema."""


def own(count: int, bad: Container[int] = ()) -> list[dict[str, Any]]:
    """Records of the project's own schema; those at the places ``bad`` lack a subject."""
    return [{**OWN, "id": str(k), "subject": "" if k in bad else f"Ann {k}"} for k in range(count)]


def write(path: Path, records: Sequence[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        columns = dict.fromkeys(key for record in records for key in record)  # pyarrow would take the first one's
        pq.write_table(pa.table({key: [record.get(key) for record in records] for key in columns}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records))
    return path
