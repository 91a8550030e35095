"""Scores of edits beside the localization effects at their layers: what regressions and correlations are about."""

from __future__ import annotations

import polars as pl

from causalcone.analysis.scores import SCORES
from causalcone.analysis.tables.traces import TableError

EDIT = ["fact_id", "problem", "method", "window", "layer"]


def edits_with_effects(scores: pl.DataFrame, effects: pl.DataFrame) -> pl.DataFrame:
    """The scores of edits with the effect of their fact at the edited layer, or at the centre of the edited window
    (Hase et al. 2023; METHODS 6): one row per edit whose fact and layer both have an effect.

    ``scores`` is what the function ``scores`` gives, ``effects`` has one row per fact and layer of a single state
    (columns fact_id, layer, effect), such as ``tracing_effects`` and ``zeroing_effects`` of one method, kind and window
    give. Edits of facts without effects, and effects that are null, are left out. Columns: those of ``EDIT``, edit_id,
    effect, and ``SCORES``. Raises ``TableError`` where a fact has two effects at one layer, and where nothing is left.
    """
    per_layer = effects.select("fact_id", "layer", "effect").drop_nulls()
    twice = per_layer.filter(pl.struct("fact_id", "layer").is_duplicated())
    if twice.height:
        fact, layer, _ = twice.row(0)
        raise TableError(
            f"fact {fact!r} has several effects at layer {layer}; choose one method, kind and window of effects"
        )
    joined = scores.join(per_layer, on=["fact_id", "layer"], how="inner", maintain_order="left")
    if joined.is_empty():
        raise TableError(
            "no edit is of a fact and layer that effects are known of; trace the facts that are edited, and look at "
            f"the layers: edits are at {_some(scores['layer'])}, effects at {_some(per_layer['layer'])}"
        )
    return joined.select(*EDIT, "edit_id", "effect", *SCORES)


def _some(layers: pl.Series) -> str:
    found = layers.unique().sort().to_list()
    return ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "") if found else "none"
