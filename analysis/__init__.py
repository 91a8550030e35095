"""Effects, scores, statistics and figures from tables of results. Reads tables only and needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from causalcone.analysis.effects import (
    average_indirect_effect,
    concentrated_facts,
    flagged_facts,
    peak_layers,
    restore_effects,
    tracing_effects,
    zeroing_effects,
)
from causalcone.analysis.layer_effects import (
    gradient_norms,
    gradient_summary,
    joint_effects,
    severed_effects,
    zeroing_curve,
)
from causalcone.analysis.scores import SCORES, counterfact_metrics, mean_scores, probe_metrics, scores, zsre_metrics
from causalcone.analysis.sequences import health, sequence_scores
from causalcone.analysis.tables.edits import (
    CHECKPOINT_SCHEMA,
    EDIT_SCHEMA,
    METRIC_SCHEMA,
    PROBE_SCHEMA,
    TEXT_SCHEMA,
    read_checkpoints,
    read_edits,
    read_metrics,
    read_probes,
    read_texts,
)
from causalcone.analysis.tables.traces import (
    GRADIENT_SCHEMA,
    ROLES,
    TRACE_SCHEMA,
    TableError,
    read_gradients,
    read_traces,
    with_roles,
)

if TYPE_CHECKING:
    from causalcone.analysis import plot

__all__ = [
    "CHECKPOINT_SCHEMA",
    "EDIT_SCHEMA",
    "GRADIENT_SCHEMA",
    "METRIC_SCHEMA",
    "PROBE_SCHEMA",
    "ROLES",
    "SCORES",
    "TEXT_SCHEMA",
    "TRACE_SCHEMA",
    "TableError",
    "average_indirect_effect",
    "concentrated_facts",
    "counterfact_metrics",
    "flagged_facts",
    "gradient_norms",
    "gradient_summary",
    "health",
    "joint_effects",
    "mean_scores",
    "peak_layers",
    "plot",
    "probe_metrics",
    "read_checkpoints",
    "read_edits",
    "read_gradients",
    "read_metrics",
    "read_probes",
    "read_texts",
    "read_traces",
    "restore_effects",
    "scores",
    "sequence_scores",
    "severed_effects",
    "tracing_effects",
    "with_roles",
    "zeroing_curve",
    "zeroing_effects",
    "zsre_metrics",
]


def __getattr__(name: str) -> Any:
    if name == "plot":  # matplotlib is loaded only by those who plot
        import importlib

        return importlib.import_module("causalcone.analysis.plot")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
