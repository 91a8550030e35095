"""Summaries of sequences of edits for the terminal."""

from pathlib import Path

from rich.table import Table

from causalcone.analysis.sequences import health, sequence_scores
from causalcone.analysis.tables.names import method_name
from causalcone.runners.show.tables import new_table

SHOWN = {
    "rewrite_p": "p rewrite",
    "efficacy_score": "efficacy",
    "paraphrase_score": "paraphrase",
    "neighborhood_score": "neighbourhood",
}
"""Metrics of edits, with their columns."""


def checkpoint_tables(folder: Path) -> list[Table]:
    """A table for each group of edits, a row for each checkpoint of each method; the model's health is beside those of
    earlier edits and new ones."""
    scores = sequence_scores(folder / "checkpoints")
    of_model = health(scores)
    key = ["method", "window", "layer", "edits"]
    tables = []
    for group, title in (("newest", "Edits of the newest batch"), ("earlier", "A sample of all earlier edits")):
        rows = scores.filter(group=group).pivot("metric", index=key, values="post", maintain_order=True)
        if rows.is_empty():
            continue
        rows = rows.join(of_model, on=key, how="left", maintain_order="left")
        shown = [name for name in SHOWN if name in rows.columns]
        table = new_table(title, "method", "edits", *(SHOWN[name] for name in shown), "perplexity x", "norm")
        for row in rows.iter_rows(named=True):
            values = [row[name] for name in (*shown, "perplexity_ratio", "relative_norm")]
            cells = ["" if value is None else f"{value:.3f}" for value in values]
            table.add_row(method_name(row["method"], row["window"]), f"{row['edits']:,}", *cells)
        tables.append(table)
    return tables
