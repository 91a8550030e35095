"""FLOPs of the products that a call executes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from torch.utils.flop_counter import FlopCounterMode

from causalcone.engine.edit.deltas.delta import LowRank


def counted(function: Callable[[], Any]) -> int:
    """FLOPs of the products with weights; those of attention are left out."""
    # a change's norm is a product too, but none with weights
    with patch.object(LowRank, "norm", 1.0), FlopCounterMode(display=False) as counter:
        function()
    by_operation = counter.get_flop_counts()["Global"].items()
    return sum(n for operation, n in by_operation if str(operation) in ("aten.mm", "aten.addmm"))
