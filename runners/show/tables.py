"""Summaries of tables of results, for the terminal."""

from dataclasses import dataclass

import polars as pl
from rich.table import Table

from causalcone.analysis.tables.names import counted, words
from causalcone.analysis.tables.traces import ROLES, STATE, State, rows_of

MOST_HEADS = 10

_SEVERED = {"sever_mlp": ", MLP severed", "sever_attn": ", attention severed", "sever_both": ", both severed"}


def effect_tables(averages: pl.DataFrame) -> list[Table]:
    """Average indirect effect by state (rows) and token role (columns), the largest over layers, and where; of heads,
    those with the largest effects."""
    tables, roles = [], [*map(words, ROLES)]
    if states := _states(averages):
        tables.append(new_table("Average indirect effect, largest over layers (layer)", "state", *roles))
        for state in states:
            peaks = (_peak(rows_of(averages, state).filter(pl.col("role") == role)) for role in ROLES)
            tables[-1].add_row(_name(state), *(f"{effect:+z.3f} ({n})" if n >= 0 else "-" for n, effect in peaks))
    heads, title = _top_heads(averages)
    if heads:
        tables.append(new_table(f"Average indirect effect of {title}", "layer and head", *roles))
        for state, layer in heads:
            row = rows_of(averages, state).filter(layer=layer)
            effects = dict(row.select(pl.col("role").cast(pl.String), "effect").iter_rows())
            cells = (f"{effects[role]:+z.3f}" if role in effects else "-" for role in ROLES)
            tables[-1].add_row(_head_name(state, layer), *cells)
    return tables


def layer_tables(means: pl.DataFrame, title: str, form: str = "+z.3f") -> list[Table]:
    """Mean effects by layer (rows) and state (columns), the largest of each state in bold; of heads, those with the
    largest effects."""
    tables = []

    def cell(state: State, layer: int) -> str:
        return f"{rows_of(means, state).filter(layer=layer)['effect'].item():{form}}"

    if states := _states(means):
        tables.append(new_table(title, "layer", *map(_name, states)))
        peaks = {state: _peak(rows_of(means, state))[0] for state in states}
        for layer in means["layer"].unique().sort():
            bold = ("[bold]{}[/bold]" if layer == peaks[state] else "{}" for state in states)
            cells = (shown.format(cell(state, layer)) for shown, state in zip(bold, states, strict=True))
            tables[-1].add_row(str(layer), *cells)
    heads, which = _top_heads(means)
    if heads:
        tables.append(new_table(f"{title}: {which}", "layer and head", "effect"))
        for state, layer in heads:
            tables[-1].add_row(_head_name(state, layer), cell(state, layer))
    return tables


def gradient_table(summary: pl.DataFrame) -> Table:
    """The largest mean norm of integrated gradients and the completeness gap, by kind."""
    table = new_table("Integrated gradients", "kind", "largest mean norm (layer)", "mean |gap|", "largest |gap|")
    for kind, layer, norm, mean_gap, largest_gap, _ in summary.iter_rows():
        table.add_row(kind, f"{norm:.4g} ({layer})", f"{mean_gap:.3g}", f"{largest_gap:.3g}")
    return table


GAP_NOTE = (
    "gap: how far the sum of an attribution is from the change in p(target) along its path. It is large for hidden "
    "states from a zero baseline: the norm after them undoes any scale, so that nearly all of p changes in a step "
    "close to zero, which the quadrature's points miss. Use --baseline corrupted."
)

_of_heads = pl.col("kind").str.starts_with("head.")


def new_table(title: str, first: str, *columns: str) -> Table:
    """An empty table; numbers are to the right of the first column."""
    table = Table(first, title=title, title_justify="left", min_width=min(len(title), 78))
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _states(frame: pl.DataFrame) -> list[State]:
    """States other than heads, in the order of their rows."""
    return frame.filter(~_of_heads).select(STATE).unique(maintain_order=True).rows()


def _top_heads(frame: pl.DataFrame) -> tuple[list[tuple[State, int]], str]:
    """The heads, each in a layer, with the largest effects, and how many there are of how many. Ranked are effects that
    all facts have: a role that few of them have shows those facts as much as the head."""
    by = [*STATE, "layer"]
    effects = frame.filter(_of_heads).filter(pl.col("facts") == pl.max("facts"))
    heads = effects.group_by(by).agg(pl.max("effect")).sort(-pl.col("effect"), *by)
    top = [((method, kind, window), layer) for method, kind, window, layer, _ in heads.head(MOST_HEADS).rows()]
    return top, f"the {len(top)} of {counted(len(heads), 'head')} with the largest"


def _name(state: State) -> str:
    method, kind, window = state
    return f"{kind}:{window}{_SEVERED.get(method, '')}"


def _head_name(state: State, layer: int) -> str:
    _, kind, window = state
    around = f", {window} layers around" * (window > 1)
    return f"{layer}, head {kind.removeprefix('head.')}{around}"


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
        return (
            "Early site: restoring the hidden state of the subject's last token brings back "
            f"{max(self.subject_last):+z.3f} of p(answer) at layer {self.early_layer}, "
            f"and {self.subject_last[-1]:+z.3f} at the last layer.\n"
            f"Late site: restoring that of the prompt's last token brings back {self.last[0]:+z.3f} at layer 0, "
            f"and {max(self.last):+z.3f} at its best, half of it from layer {self.late_layer} on."
        )


def find_sites(averages: pl.DataFrame) -> Sites:
    """The early and the late site in the average indirect effects of hidden:1."""
    single = averages.filter(method="restore", kind="hidden", window=1).sort("layer")
    return Sites(*(single.filter(pl.col("role") == role)["effect"].to_list() for role in ("last_subject", "last")))


def severed_sentence(effects: pl.DataFrame) -> str:
    """A sentence on how much severing takes from restoring hidden:1, at the layer where severed MLPs take the most."""
    layer, _ = _peak(effects.filter(method="sever_mlp"), "difference")
    mlp, attn = (effects.filter(method=method, layer=layer) for method in ("sever_mlp", "sever_attn"))
    return (
        f"Severed: of the {mlp['plain'][0]:+z.3f} that the subject's last token brings back at layer {layer}, "
        f"{mlp['severed'][0]:+z.3f} remains with its later MLPs severed, and {attn['severed'][0]:+z.3f} with its "
        "later attention severed."
    )


def zeroing_sentence(curve: pl.DataFrame) -> str:
    """A sentence on where zeroing a single state takes the most."""
    layer, most = _peak(curve, "effect")
    kind, window = curve.select("kind", "window").row(0)
    last = curve.sort("layer")["effect"][-1]
    within, at = (f"in {window} layers around", "around") if window > 1 else ("at", "at")
    return (
        f"Zeroing: without the subject's {kind} outputs {within} layer {layer}, {most:.3f} of p(answer) is lost, {at} "
        f"the last layer {last:.3f}."
    )


def _peak(frame: pl.DataFrame, column: str = "effect") -> tuple[int, float]:
    """The layer of the largest value, the lowest of equals, -1 where there are no rows; and that value."""
    values = frame.sort(column, "layer", descending=[True, False]).select("layer", column)
    return values.row(0) if len(values) else (-1, 0.0)
