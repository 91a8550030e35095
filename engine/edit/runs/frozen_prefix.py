"""The unedited model's rows of texts: computed once, and then frozen for all steps of all edits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.runs.layers import Layers
from causalcone.engine.edit.runs.packed_runs import Runs, Text, in_order
from causalcone.kernels.transfer import send

Places = tuple[np.ndarray, np.ndarray]
"""Texts (n,) by number, and one token (n,) of each."""

Wanted = Mapping[tuple[str, int], Places]
"""By name and layer, where rows are kept: a field of ``Passed``, or ``inputs``, what enters the layer."""


@dataclass(frozen=True)
class FrozenPrefix:
    """start (N,): the row of each text's first token; keys_values: of attention, of all rows, by layer; rows: those
    wanted, in the order of their places; log_p (n, V): the next token's distributions, in float32 or better."""

    start: np.ndarray
    keys_values: Mapping[int, Tensor]
    rows: Mapping[tuple[str, int], Tensor]
    log_p: Tensor


@torch.inference_mode(False)
@torch.no_grad()
def run_unedited(
    layers: Layers,
    texts: Sequence[Text],
    wanted: Wanted,
    past_from: int | None = None,
    distributions: Places | None = None,
) -> FrozenPrefix:
    """Run texts through the unedited model.

    past_from: the first layer of which attention's keys and values are kept (None: of no layer); distributions: where
    the next token's distribution is read. Layers that no result depends on are not computed.
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    order = in_order(lengths)
    start = np.empty(len(texts), dtype=np.int64)
    start[order] = np.cumsum(lengths[order]) - lengths[order]
    places = [*wanted.values(), *([] if distributions is None else [distributions])]
    where = tuple(start[numbers] + tokens for numbers, tokens in places)
    runs, sent = send((Runs.whole(lengths[order]), where), layers.device)
    index = dict(zip(wanted, sent, strict=False))
    whole = past_from is not None or distributions is not None
    last = layers.depth - 1 if whole else max((layer for _, layer in wanted), default=-1)
    rows = layers.enter([texts[i] for i in order])
    wanted_rows: dict[tuple[str, int], Tensor] = {}
    keys_values: dict[int, Tensor] = {}
    for layer in range(last + 1):
        passed = layers.advance(layers.block(layer), rows, runs, keep_keys=("keys", layer) in wanted)
        if past_from is not None and layer >= past_from:
            keys_values[layer] = passed.keys_values
        of_layer = {"inputs": rows, **vars(passed)}
        for (name, at), kept in index.items():
            if at == layer:
                wanted_rows[name, at] = of_layer[name].index_select(0, kept)
        rows = passed.out
    log_p = rows.new_empty(0, 0)
    if distributions is not None:
        states = layers.architecture.final_norm(rows.index_select(0, sent[-1]))
        logits = layers.readout().logits(states)
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return FrozenPrefix(start, keys_values, wanted_rows, log_p)
