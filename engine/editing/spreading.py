"""The rows of MEMIT's contexts up to the lookup, taken through a window of layers that are changed one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.editing.layers import Layers, Passed
from causalcone.engine.editing.packing import Runs, in_order, spans
from causalcone.engine.editing.training import Training
from causalcone.engine.editing.unedited import Places, Unedited
from causalcone.engine.editing.windows import Window
from causalcone.engine.models.base import Block
from causalcone.kernels.tiles import pieces

Update = Callable[[Tensor, slice], Tensor]
"""What a change adds to the values (R, hidden) of rows with keys (R, inner): a slice of all rows."""


def head_places(training: Training) -> Places:
    """All tokens of all contexts up to the lookup, of all requests."""
    texts = training.contexts.flatten()
    count = training.prompts.lookup[texts] + 1
    return np.repeat(texts, count), spans(np.zeros_like(count), count)


class Heads:
    """The contexts up to the lookups of n requests, each bare prompt first, on their way through the window.

    goal (n, hidden) is what the bare prompts' outputs at the window's last layer are to become.
    """

    def __init__(
        self,
        layers: Layers,
        window: Window,
        unedited: Unedited,
        training: Training,
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
        self._current: tuple[Block, Passed] | None = None

    @torch.no_grad()
    def keys(self, layer: int) -> Tensor:
        """(n, inner) float64: each request's key at a layer of the window, as the layers before it are now: half of it
        is the bare prompt's."""
        while self.at < layer:
            self.rows = self.layers.advance(self.layers.block(self.at), self.rows, self.runs).out
            self.at += 1
        block = self.layers.block(layer)
        passed = self.layers.advance(block, self.rows, self.runs, keep_keys=True)
        self._current = block, passed
        assert passed.keys is not None
        own = passed.keys[self.lookup].double()
        return (own[:, 0] + own[:, 1:].mean(1)) / 2

    @torch.no_grad()
    def rest(self) -> Tensor:
        """(n, hidden) float64: how far the bare prompts' outputs at the window's last layer are from the goal."""
        assert self._current is not None
        rows = self._current[1].out.index_select(0, self.bare)
        for layer in range(self.at + 1, self.window.layers[-1] + 1):
            rows = self.layers.advance(self.layers.block(layer), rows, self.bare_runs).out
        return self.goal - rows.index_select(0, self.bare_lookup).double()

    @torch.no_grad()
    def apply(self, update: Update) -> None:
        """Change the layer whose keys were asked for last, and leave it."""
        assert self._current is not None
        block, passed = self._current
        assert passed.keys is not None
        out = torch.empty_like(passed.out)
        for part in pieces(len(out), self.layers.tiles.rows):
            values = passed.values[part] + update(passed.keys[part], part)
            out[part] = passed.mid[part] + block.mlp_output(values)
        self.rows, self._current = out, None
        self.at += 1


def _whole_runs(count: np.ndarray, device: torch.device) -> Runs:
    none = np.zeros_like(count)
    return Runs(none, count, none, none, device)
