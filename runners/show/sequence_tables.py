"""Summaries of sequences of edits for the terminal."""

from pathlib import Path

from rich.table import Table

from causalcone.analysis.sequences import GROUPS, overview, sequence_scores
from causalcone.analysis.tables.names import method_name
from causalcone.runners.show.tables import new_table

SHOWN = {
    "rewrite_p": "p",
    "efficacy_score": "efficacy",
    "paraphrase_score": "paraphr.",
    "neighborhood_score": "neighb.",
    "perplexity_ratio": "ppl x",
    "relative_norm": "norm",
}
"""Metrics, with their columns."""


def checkpoint_tables(folder: Path) -> list[Table]:
    """A table for each group of edits, a row for each checkpoint of each method; the model's perplexity, over that
    before, and the norm of the change are beside both."""
    rows = overview(sequence_scores(folder / "checkpoints"))
    tables = []
    for group, of_group in rows.group_by("group", maintain_order=True):
        shown = [name for name in SHOWN if name in rows.columns]
        title = f"Edits in sequence: {GROUPS[str(*group)]}"
        table = new_table(title, "method", "edits", *(SHOWN[name] for name in shown))
        for row in of_group.iter_rows(named=True):
            cells = ["" if row[name] is None else f"{row[name]:.3f}" for name in shown]
            table.add_row(method_name(row["method"], row["window"]), f"{row['edits']:,}", *cells)
        tables.append(table)
    return tables
