"""Which rows of an experiment are different at all: the causal cones of its runs, found by numbering values.

Two rows are one row if they are computed from the same rows. Walking through the layers with that rule alone, every
run shares with its parent whatever its intervention cannot reach; windows that start together are one run until the
first ends; equal windows of different sizes are one run; a restored row is the clean run's row. Nothing is special
cased, so every intervention that can be written as overwrites is computed in its cone and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from causalcone.engine.interventions import CORRUPTED, SITES, Experiment


@dataclass(frozen=True)
class Shape:
    """What a plan depends on, of a fact: how many tokens run through the model, which carry noise, which are read.

    ``noised`` and ``read`` are half-open token ranges.
    """

    tokens: int
    noised: tuple[int, int]
    read: tuple[int, int]


@dataclass(frozen=True)
class LayerValues:
    """The distinct values of one layer, each numbered from 0 at its stage. A value *varies* if it depends on the
    noise sample; the others are the same for all samples of a fact.

    state (A, T): number of the layer's input row for each active run and token; input_varies: (inputs,)
    attn_run, attn_token (attns,): an active run and token where the attention output occurs; attn_varies
    mid_input, mid_attn (mids,): the rows whose sum is the residual after attention; mid_varies
    out_mid, out_mlp (outs,): the rows whose sum is the layer's output; MLP outputs bear the number of the mid row
    they are computed from; out_varies
    """

    state: np.ndarray
    input_varies: np.ndarray
    attn_run: np.ndarray
    attn_token: np.ndarray
    attn_varies: np.ndarray
    mid_input: np.ndarray
    mid_attn: np.ndarray
    mid_varies: np.ndarray
    out_mid: np.ndarray
    out_mlp: np.ndarray
    out_varies: np.ndarray


@dataclass(frozen=True)
class Cone:
    """The values of all layers, and where the runs end: ``final`` (R, T) numbers each run's output rows."""

    input_token: np.ndarray
    layers: list[LayerValues]
    final: np.ndarray


def find_cone(shape: Shape, experiment: Experiment, depth: int) -> Cone:
    """Number the values of an experiment through all layers. Runs become active in the layer where they fork."""
    T, (start, end) = shape.tokens, shape.noised
    state = np.tile(np.arange(T), (2, 1))
    state[CORRUPTED, start:end] = T + np.arange(end - start)
    input_token = np.concatenate([np.arange(T), np.arange(start, end)])
    varies = np.arange(len(input_token)) >= T

    row_of = experiment.base.copy()  # runs that have not forked yet are their base
    layers = []
    for layer in range(depth):
        forking = np.flatnonzero(experiment.forks == layer)
        row_of[forking] = len(state) + np.arange(len(forking))
        state = np.concatenate([state, state[experiment.base[forking]]])
        values, state, varies = _number_layer(state, varies, experiment, row_of, layer)
        layers.append(values)
    return Cone(input_token, layers, state[row_of])


def _number_layer(
    state: np.ndarray, varies: np.ndarray, experiment: Experiment, row_of: np.ndarray, layer: int
) -> tuple[LayerValues, np.ndarray, np.ndarray]:
    T = state.shape[1]
    prefix, first = _number_prefixes(state)
    attn_run, attn_token = np.divmod(first, T)
    attn_varies = np.logical_or.accumulate(varies[state], axis=1)[attn_run, attn_token]
    attn = _overwrite(prefix, "attn", experiment, row_of, layer)

    mid, (mid_input, mid_attn) = _number(state, attn)
    mid_varies = varies[mid_input] | attn_varies[mid_attn]
    mlp = _overwrite(mid, "mlp", experiment, row_of, layer)

    out, (out_mid, out_mlp) = _number(mid, mlp)
    out_varies = mid_varies[out_mid] | mid_varies[out_mlp]
    out = _overwrite(out, "hidden", experiment, row_of, layer)

    values = LayerValues(
        state, varies, attn_run, attn_token, attn_varies, mid_input, mid_attn, mid_varies, out_mid, out_mlp, out_varies
    )
    return values, out, out_varies


def _number_prefixes(state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the attention outputs: a token's is fixed by the input rows of all tokens up to it.

    Returns the numbers (A, T) and, for each number, the flat index of its first occurrence.
    """
    runs, T = state.shape
    prefix = np.empty_like(state)
    firsts = []
    offset = 0
    previous = np.zeros(runs, dtype=np.int64)
    for token in range(T):
        key = previous * (int(state[:, token].max()) + 1) + state[:, token]
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        prefix[:, token] = inverse + offset
        firsts.append(first * T + token)
        offset += len(first)
        previous = inverse
    return prefix, np.concatenate(firsts)


def _number(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Number the distinct pairs of two arrays (A, T): the numbers (A, T), and the pair behind each number."""
    width = int(right.max()) + 1
    values, inverse = np.unique(left * width + right, return_inverse=True)
    return inverse.reshape(left.shape), (values // width, values % width)


def _overwrite(values: np.ndarray, site: str, experiment: Experiment, row_of: np.ndarray, layer: int) -> np.ndarray:
    o = experiment.overwrites
    now = (o.site == SITES.index(site)) & (o.start <= layer) & (layer < o.end)
    if not now.any():
        return values
    changed = values.copy()
    changed[row_of[o.run[now]], o.token[now]] = values[row_of[o.source[now]], o.token[now]]
    return changed
