"""What a traces folder shows, as a table for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl
from rich.table import Table

from causalcone.analysis.effects import average_indirect_effect
from causalcone.analysis.roles import ROLES


def effect_table(averages: pl.DataFrame) -> Table:
    """Average indirect effect by state (rows) and token role (columns): the largest over layers, and where."""
    table = Table(title="Average indirect effect, largest over layers (layer)", title_justify="left")
    table.add_column("state")
    for role in ROLES:
        table.add_column(role.replace("_", " "), justify="right")
    for (kind, window), state in averages.group_by("kind", "window", maintain_order=True):
        cells = []
        for role in ROLES:
            best = state.filter(pl.col("role") == role).sort("effect", descending=True)
            cells.append(f"{best['effect'][0]:+.3f} ({best['layer'][0]})" if len(best) else "-")
        table.add_row(f"{kind}:{window}", *cells)
    return table


def effects_by_layer(averages: pl.DataFrame, kind: str, window: int, role: str) -> list[float]:
    """The average indirect effect of a state at a role's tokens, layer by layer."""
    chosen = averages.filter((pl.col("kind") == kind) & (pl.col("window") == window) & (pl.col("role") == role))
    return chosen.sort("layer")["effect"].to_list()


def read_averages(traces: Path) -> pl.DataFrame:
    return average_indirect_effect(traces)


@dataclass(frozen=True)
class Sites:
    """Where restoring a single hidden state helps, by layer: at the subject's last token and at the prompt's last."""

    subject_last: list[float]
    last: list[float]

    @property
    def early_layer(self) -> int:
        """The layer where the last subject token matters most."""
        return self.subject_last.index(max(self.subject_last))

    @property
    def late_layer(self) -> int:
        """The first layer by which the last token has half of its largest effect."""
        return next(layer for layer, effect in enumerate(self.last) if effect >= max(self.last) / 2)

    def sentence(self) -> str:
        """The two sites in words and numbers."""
        return (
            "Early site: restoring the hidden state of the subject's last token brings back "
            f"{max(self.subject_last):+.3f} of p(answer) at layer {self.early_layer}, "
            f"and {self.subject_last[-1]:+.3f} at the last layer.\n"
            f"Late site: restoring that of the prompt's last token brings back {self.last[0]:+.3f} at layer 0, "
            f"and {max(self.last):+.3f} at its best, half of it from layer {self.late_layer} on."
        )


def find_sites(averages: pl.DataFrame) -> Sites:
    """The early and the late site in the average indirect effects of hidden:1."""
    return Sites(*(effects_by_layer(averages, "hidden", 1, role) for role in ("last_subject", "last")))
