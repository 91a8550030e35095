"""Held-out text, whose perplexity says how much a sequence of edits has damaged the model."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from causalcone.engine.edit.deltas.delta import NOTHING, Delta
from causalcone.engine.edit.methods.batching import layers_and_batching
from causalcone.engine.edit.moments.sampled import sampled_texts
from causalcone.engine.edit.runs.packed_runs import Runs, Text, in_order
from causalcone.engine.errors import ExperimentError
from causalcone.engine.run.session import Session
from causalcone.kernels.transfer import fetch, send

LENGTH = 128
"""Tokens of a piece of text."""


@dataclass
class HeldOut:
    """The first ``tokens`` tokens of texts, in pieces of ``LENGTH`` that are read alone; by default of texts that the
    unedited model writes."""

    session: Session
    texts: Iterable[str] | None = None
    tokens: int = 4096
    _pieces: list[Text] = field(default_factory=list)
    _unedited: float | None = None

    @property
    def pieces(self) -> list[Text]:
        if not self._pieces:
            length = min(LENGTH, self.session.sizes.positions)
            texts = sampled_texts(self.session, "held-out text") if self.texts is None else self.texts
            left = self.tokens
            for text in texts:
                ids = self.session.tokenizer(text)["input_ids"]
                for at in range(0, len(ids), length):
                    piece = ids[at : at + min(length, left)]
                    if len(piece) > 1:
                        self._pieces.append(Text(tuple(piece)))
                        left -= len(piece)
                if left < 2:
                    break
            if not self._pieces:
                raise ExperimentError("the held-out texts have no two tokens in a row; give others")
        return self._pieces

    def unedited(self) -> float:
        """The perplexity of the model as it is."""
        if self._unedited is None:
            self._unedited = self.perplexity(NOTHING)
        return self._unedited

    @torch.inference_mode(False)
    @torch.no_grad()
    def perplexity(self, delta: Delta) -> float:
        """exp of the mean negative log-likelihood of all tokens but the pieces' first, of the model with a change."""
        with self.session.computing():
            layers, batching = layers_and_batching(self.session)
            layers = layers.changed_by(delta)
            total, count = 0.0, 0
            for texts in batching.of_items(
                self.pieces, lambda text: 2 * len(text) * batching.row_bytes, lambda _: "text"
            ):
                lengths = np.array([len(text) for text in texts])
                ordered = [texts[i] for i in in_order(lengths)]
                last = np.cumsum(np.sort(lengths)) - 1
                reading = np.setdiff1d(np.arange(lengths.sum()), last)
                targets = np.concatenate([text.tokens[1:] for text in ordered])
                whole: Runs[np.ndarray] = Runs.whole(np.sort(lengths))
                runs, read, answers = send((whole, reading, targets), layers.device)
                rows = layers.enter(ordered)
                for layer in range(layers.depth):
                    rows = layers.advance(layers.block(layer), rows, runs).out
                states = layers.architecture.final_norm(rows.index_select(0, read))
                log_p = layers.readout().target_log_probabilities(states, answers.long())
                total += float(fetch(log_p).wait()[0].sum())
                count += len(targets)
        return float(np.exp(-total / count))
