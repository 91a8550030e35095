"""Memory for the rows of a pass, taken once and used by every layer and by the passes that follow.

Fresh memory for every layer costs a CPU a tenth of the time of a pass. Four slots suffice, since what a layer computes
first is dead when it computes what comes later:

- stream: a layer's inputs, then its outputs
- keys: keys and values, then MLP outputs
- queries: queries, then what attention adds
- heads: the heads' outputs, then the residual after attention
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from causalcone.engine.models.base import Sizes
from causalcone.engine.plan.plan import Plan, Rows

SLOTS = ("stream", "keys", "queries", "heads")


class Buffers:
    """Slots of rows in one dtype on one device. What a slot held is lost when it is taken again."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._slots: dict[str, Tensor] = {}

    def reserve(self, uses: dict[str, int], room: float = 1.0) -> None:
        """Make room for ``uses``, in elements by slot. Where slots turn out too small all are made anew, ``room`` times
        as large as needed, so that the largest of the passes to come fits as well."""
        if all(slot in self._slots and self._slots[slot].numel() >= elements for slot, elements in uses.items()):
            return
        more = room if self._slots else 1.0
        self.clear()
        for slot, elements in uses.items():
            self._slots[slot] = torch.empty(int(more * elements), dtype=self.dtype, device=self.device)

    def clear(self) -> None:
        """Give all memory back."""
        self._slots.clear()

    def take(self, slot: str, rows: int, width: int) -> Tensor:
        """A reserved slot as an uninitialised tensor (rows, width)."""
        return self._slots[slot][: rows * width].view(rows, width)


def slot_uses(plan: Plan, sizes: Sizes) -> dict[str, list[tuple[Rows, int]]]:
    """What each slot holds in the course of a pass: rows of a stage, and their width."""
    heads, kv, hidden = sizes.query_width, sizes.key_value_width, sizes.hidden
    layers = plan.layers
    projected = [layer.attn + layer.mix.base.rows for layer in layers]
    attn = [rows + layer.attn_given.rows for rows, layer in zip(projected, layers, strict=True)]
    mlp = [layer.mlp.rows + layer.mlp_given.rows for layer in layers]
    return {
        "stream": [(layer.out_mid.rows + layer.out_given.rows, hidden) for layer in layers],
        "keys": [(layer.keys_values.rows, kv) for layer in layers] + [(rows, hidden) for rows in mlp],
        "queries": [(layer.queries.rows, heads) for layer in layers] + [(rows, hidden) for rows in attn],
        "heads": [(rows, heads) for rows in projected] + [(layer.mid_input.rows, hidden) for layer in layers],
    }


def slot_elements(
    uses: Sequence[dict[str, list[tuple[Rows, int]]]], counts: Sequence[tuple[int, int]]
) -> dict[str, int]:
    """Elements of each slot for groups of (facts, samples): the largest sum over the groups of one use."""
    return {
        slot: max(
            sum(rows.count(*count) * width for (rows, width), count in zip(column, counts, strict=True))
            for column in zip(*(use[slot] for use in uses), strict=True)
        )
        for slot in SLOTS
    }
