"""The rows of MEMIT's contexts up to the lookup, taken through a window of layers that are changed one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.methods.objective import EditObjective
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs.frozen_prefix import FrozenPrefix, Places
from causalcone.engine.edit.runs.layers import Layers, Passed
from causalcone.engine.edit.runs.packed_runs import Runs, in_order, spans
from causalcone.kernels.tiles import pieces

Update = Callable[[Tensor, slice], Tensor]
"""What a change adds to the values (R, hidden) of rows with keys (R, inner): a slice of all rows."""


def head_places(training: EditObjective) -> Places:
    """All tokens of all contexts up to the lookup, of all requests."""
    texts = training.contexts.flatten()
    count = training.prompts.lookup[texts] + 1
    return np.repeat(texts, count), spans(np.zeros_like(count), count)


class Prefixes:
    """The contexts up to the lookups of n requests, each bare prompt first, on their way through the window.

    goal (n, hidden) is what the bare prompts' outputs at the window's last layer are to become.
    """

    def __init__(
        self,
        layers: Layers,
        window: Window,
        unedited: FrozenPrefix,
        training: EditObjective,
        numbers: Sequence[int],
        goal: Tensor,
    ) -> None:
        """``numbers`` are the requests' among those of the training; ``unedited`` holds the inputs of the window's
        first layer at its ``head_places``."""
        self.layers, self.window, self.goal = layers, window, goal.double()
        every = training.prompts.lookup[training.contexts] + 1
        starts = (np.cumsum(every) - every.ravel()).reshape(every.shape)
        n, contexts = len(numbers), every.shape[1]
        order = in_order(every[list(numbers)].ravel())
        count = every[list(numbers)].ravel()[order]
        first = np.cumsum(count) - count
        place = np.argsort(order)
        bare = order % contexts == 0
        bare_count = count[bare]
        bare_end = np.empty(n, dtype=np.int64)
        bare_end[order[bare] // contexts] = np.cumsum(bare_count) - 1

        self.runs, self.bare_runs = (_whole_runs(each, layers.device) for each in (count, bare_count))
        picked, lookup, self.bare, self.bare_lookup, self.request = (
            torch.from_numpy(index).to(layers.device)
            for index in (
                spans(starts[list(numbers)].ravel()[order], count),
                (first + count - 1)[place],
                spans(first[bare], bare_count),
                bare_end,
                np.repeat(order // contexts, count),
            )
        )
        self.lookup = lookup.view(n, contexts)
        self.at = window.layers[0]
        self.rows = unedited.kept["inputs", self.at].index_select(0, picked)
        self._passed: Passed | None = None

    @torch.no_grad()
    def look(self, layer: int) -> tuple[Tensor, Tensor]:
        """At a layer of the window, as the layers before it are now: each request's key (n, inner), of which the bare
        prompt's is half, and how far its output (n, hidden) at the window's last layer is from the goal; float64."""
        while self.at < layer:
            self.rows = self.layers.advance(self.layers.block(self.at), self.rows, self.runs).out
            self.at += 1
        passed = self._pass()
        assert passed.keys is not None
        keys = passed.keys[self.lookup].double()
        rows = passed.out.index_select(0, self.bare)
        for later in range(layer + 1, self.window.layers[-1] + 1):
            rows = self.layers.advance(self.layers.block(later), rows, self.bare_runs).out
        rest = self.goal - rows.index_select(0, self.bare_lookup).double()
        return (keys[:, 0] + keys[:, 1:].mean(1)) / 2, rest

    def release(self) -> None:
        """Give back what was seen at the layer, several times the memory of what enters it; it is computed again."""
        self._passed = None

    @torch.no_grad()
    def apply(self, update: Update) -> None:
        """Go through the layer that was looked at, changed."""
        block, passed = self.layers.block(self.at), self._pass()
        assert passed.keys is not None
        out = torch.empty_like(passed.out)
        for part in pieces(len(out), self.layers.tiles.rows):
            values = passed.values[part] + update(passed.keys[part], part)
            out[part] = passed.mid[part] + block.mlp_output(values)
        self.rows = out
        self.at += 1
        self.release()

    def _pass(self) -> Passed:
        if self._passed is None:
            self._passed = self.layers.advance(self.layers.block(self.at), self.rows, self.runs, keep_keys=True)
        return self._passed


def _whole_runs(count: np.ndarray, device: torch.device) -> Runs:
    none = np.zeros_like(count)
    return Runs(none, count, none, none, device)
