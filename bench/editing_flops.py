"""What the engine computes to edit and to score, counted from the lengths of the texts: it computes nothing itself.

Counted are multiply-adds x 2 of all products with weights: the projections of the layers, forwards and back, what edits
add to them, and the unembedding. Products of attention, and the solves with second moments, are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from causalcone.engine.editing.edits import Edit
from causalcone.engine.editing.prompts import Encoder
from causalcone.engine.editing.questions import Questions, questions_about
from causalcone.engine.editing.requests import Request
from causalcone.engine.editing.training import Training
from causalcone.engine.editing.windows import Window


@dataclass(frozen=True)
class Flops:
    """Of edits that were made together, on a model of the encoder's sizes. Every edit takes all ``steps``, and each of
    them goes forwards and back: none may have stopped early."""

    encoder: Encoder

    def rome(self, edits: Sequence[Edit], contexts: Sequence[str], steps: int) -> int:
        return 2 * sum(
            self._search(request, [edit.layer for edit in own], contexts, steps) for request, own in by_request(edits)
        )

    def memit(self, edits: Sequence[Edit], contexts: Sequence[str], steps: int) -> int:
        total = 0
        for request, own in by_request(edits):
            windows = [self._window(edit) for edit in own]
            total += self._search(request, {window[-1] for window in windows}, contexts, steps)
            total += sum(self._spread(request, len(window), contexts) for window in windows)
        return 2 * total

    def finetune(self, edits: Sequence[Edit], steps: int) -> int:
        """The rows of every request go through the unedited model once, as far as the last window's first layer."""
        first = max(self._window(edit)[0] for edit in edits)
        total = 0
        for request, own in by_request(edits):
            prompt = self.encoder.prompted(request, request.fact.prompt).text
            rows, read = len(self.encoder.followed(request, prompt, request.target)), len(request.target)
            total += rows * (first + 1) * self._layer
            total += steps * sum(self._trained(self._window(edit), rows, read) for edit in own)
        return 2 * total

    def scoring(self, edits: Sequence[Edit]) -> int:
        """Of edits of one layer each, of rank one."""
        sizes = self.encoder.sizes
        whole = any(edit.layer == sizes.depth - 1 for edit in edits)
        total = 0
        for request, own in by_request(edits):
            questions = questions_about(request, self.encoder)
            rows, read = questions.rows, sum(questions.read)
            readout = distinct_rows(questions) * self._readout
            total += self._behind(-1, rows, rows if whole else read) + readout
            for edit in own:
                total += rows * (sizes.inner + sizes.hidden) + self._behind(edit.layer, rows, read) + readout
        return 2 * total

    def _search(self, request: Request, layers: Iterable[int], contexts: Sequence[str], steps: int) -> int:
        """The unedited texts, the essence prompt's distribution, and the steps of a vector at each layer."""
        prompts = Training.of([request], self.encoder, contexts).prompts
        rows, read = int(prompts.tail_rows.sum()), int(prompts.read.sum())
        unedited = sum(map(len, prompts.texts)) * self.encoder.sizes.depth * self._layer + self._readout
        return unedited + sum(2 * steps * (self._behind(at, rows, read) + read * self._readout) for at in layers)

    def _spread(self, request: Request, layers: int, contexts: Sequence[str]) -> int:
        """In each layer of the window all contexts up to the lookup; from there to its end the bare prompt."""
        heads = np.array([prompted.lookup + 1 for prompted in self.encoder.contexts(request, contexts)])
        return int(heads.sum() * layers + heads[0] * layers * (layers - 1) // 2) * self._layer

    def _trained(self, window: Sequence[int], rows: int, read: int) -> int:
        """One step: rows behind the window's first layer, the changes of its weights, and the readout."""
        last = self.encoder.sizes.depth - 1
        first, *later = window
        change = 2 * rows  # its product, and its weight's gradient; the first layer's keys need none
        change += sum(3 * (read if layer == last else rows) for layer in later)
        weights = self.encoder.sizes.hidden * self.encoder.sizes.inner
        return 2 * (self._behind(first, rows, read) + read * self._readout) + change * weights

    def _behind(self, layer: int, rows: int, read: int) -> int:
        """Rows through all layers behind this one: in the last, those that are not read give keys and values only."""
        sizes = self.encoder.sizes
        layers = sizes.depth - 1 - layer
        if not layers:
            return 0
        return rows * layers * self._layer - (rows - read) * (self._layer - sizes.key_value_weights)

    def _window(self, edit: Edit) -> tuple[int, ...]:
        return Window.around(edit.layer, edit.window, self.encoder.sizes.depth).layers

    @property
    def _layer(self) -> int:
        """Weights of a layer's projections."""
        sizes = self.encoder.sizes
        return sizes.key_value_weights + 2 * sizes.query_weights + sizes.mlp_weights

    @property
    def _readout(self) -> int:
        return self.encoder.sizes.hidden * self.encoder.sizes.vocabulary


def by_request(edits: Sequence[Edit]) -> list[tuple[Request, list[Edit]]]:
    """The edits of each request."""
    own: dict[int, list[Edit]] = {}
    for edit in edits:
        own.setdefault(id(edit.request), []).append(edit)
    return [(each[0].request, each) for each in own.values()]


def distinct_rows(questions: Questions) -> int:
    """Rows that the answers are read at: several of them may be read at one."""
    return len({(asked.run, place) for asked in questions.asked for place in range(len(asked.tokens))})
