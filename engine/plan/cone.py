"""Which rows of an experiment are different at all: the causal cones of its runs, found by numbering values.

Two rows are one row if they are computed from the same rows. Walking through the layers with that rule alone, every
run shares with its parent whatever its intervention cannot reach; windows that start together are one run until the
first ends; equal windows of different sizes are one run; a restored row is the clean run's row. Nothing is special
cased, so every intervention that can be written as overwrites is computed in its cone and nowhere else.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from causalcone.engine.plan.interventions import SITES, ZERO, Base, Experiment, Overwrites


@dataclass(frozen=True)
class Shape:
    """What a plan depends on, of a fact's prompts: how many tokens run through the model (of the longest), which of
    them carry noise (half-open), and which are read, prompt by prompt.

    alike: for each further prompt, which of its tokens are those of the first.
    """

    tokens: int
    noised: tuple[int, int]
    read: tuple[tuple[int, ...], ...]
    alike: tuple[tuple[bool, ...], ...] = ()


@dataclass(frozen=True)
class Entries:
    """The embeddings that enter the first layer, as columns: of which prompt and token, with which draw of noise (-1
    for none), and whether the noise replaces the embedding."""

    prompt: np.ndarray
    token: np.ndarray
    draw: np.ndarray
    replace: np.ndarray


@dataclass(frozen=True)
class Mixes:
    """Heads' outputs of which some heads are overwritten, numbered after those that attention itself computes.

    base (n,): the attention output that the other heads are from; row, head, source (patches,): head ``head`` of mix
    ``row`` is that of the attention output ``source``, or a given value; varies (n,).
    """

    base: np.ndarray
    row: np.ndarray
    head: np.ndarray
    source: np.ndarray
    varies: np.ndarray


@dataclass
class LayerInputs:
    """A layer's input rows: the number of each active run's and token's (A, T), and of each number the token it belongs
    to and whether it varies."""

    state: np.ndarray
    token: np.ndarray
    varies: np.ndarray


@dataclass(frozen=True, kw_only=True)
class LayerValues:
    """The distinct values of one layer, each numbered from 0 at its stage. A value *varies* if it depends on the
    noise sample; the others are the same for all samples of a fact. After the values that attention (mixes included)
    and MLP compute come the given ones, as sources number them backwards from ``ZERO``.

    attn_run, attn_token (attns,): an active run and token where the attention output occurs; attn_varies
    mid_input, mid_attn (mids,): the rows whose sum is the residual after attention; mid_varies
    mlp_varies: of the rows that the MLP reads (mids, or inputs where it is parallel), which number its outputs
    out_mid, out_mlp (outs,): the rows whose sum is the layer's output; out_given: its source number, where it is a
    given value, else 0; out_varies
    captured: for every site but ``head``, the numbers of captures there and of the values captured
    """

    inputs: LayerInputs
    attn_run: np.ndarray
    attn_token: np.ndarray
    attn_varies: np.ndarray
    mixes: Mixes
    mid_input: np.ndarray
    mid_attn: np.ndarray
    mid_varies: np.ndarray
    mlp_varies: np.ndarray
    out_mid: np.ndarray
    out_mlp: np.ndarray
    out_given: np.ndarray
    out_varies: np.ndarray
    captured: dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Cone:
    """The values of all layers, and where the runs end: ``final`` (R, T) numbers each run's output rows."""

    entries: Entries
    layers: list[LayerValues]
    final: np.ndarray


def find_cone(shape: Shape, experiment: Experiment, depth: int, parallel: bool) -> Cone:
    """Number the values of an experiment through all layers. Runs become active in the layer where they fork."""
    entries, state = _enter(shape, experiment.bases)
    rows = LayerInputs(state, entries.token, entries.draw >= 0)

    row_of = experiment.base.copy()  # runs that have not forked yet are their base
    layers = []
    for layer in range(depth):
        forking = np.flatnonzero(experiment.forks == layer)
        row_of[forking] = len(rows.state) + np.arange(len(forking))
        rows.state = np.concatenate([rows.state, rows.state[experiment.base[forking]]])
        values, rows = _Layer(experiment, rows, row_of, layer).number(parallel)
        layers.append(values)
    return Cone(entries, layers, rows.state[row_of])


def _enter(shape: Shape, bases: tuple[Base, ...]) -> tuple[Entries, np.ndarray]:
    """The distinct embeddings of the base runs, those without noise first, and their numbers (bases, T)."""
    start, end = shape.noised
    alike = ((False,) * shape.tokens, *shape.alike)
    cells = [
        (base.draw, token, base.prompt, base.replace)
        if base.draw is not None and start <= token < end
        else (-1, token, 0 if alike[base.prompt][token] else base.prompt, False)
        for base in bases
        for token in range(shape.tokens)
    ]
    distinct, numbers = np.unique(np.array(cells, dtype=np.int64), axis=0, return_inverse=True)
    draw, token, prompt, replace = distinct.T
    return Entries(prompt, token, draw, replace.astype(bool)), numbers.reshape(len(bases), shape.tokens)


class _Layer:
    def __init__(self, experiment: Experiment, inputs: LayerInputs, row_of: np.ndarray, layer: int) -> None:
        self.experiment, self.inputs, self.row_of, self.layer = experiment, inputs, row_of, layer
        self.now = (experiment.overwrites.start <= layer) & (layer < experiment.overwrites.end)
        self.given_varies = np.array([False, *experiment.varying_vectors])

    def number(self, parallel: bool) -> tuple[LayerValues, LayerInputs]:
        state, varies = self.inputs.state, self.inputs.varies
        prefix, first = _number_prefixes(state)
        attn_run, attn_token = np.divmod(first, state.shape[1])
        attn_varies = np.logical_or.accumulate(varies[state], axis=1)[attn_run, attn_token]
        heads, mixes = self._mix(prefix, attn_varies)
        every_attn = self._with_given(np.concatenate([attn_varies, mixes.varies]))
        attn = self._overwrite("attn", heads, len(attn_varies) + len(mixes.base))

        mid, (mid_input, mid_attn) = _number(state, attn)
        mid_varies = varies[mid_input] | every_attn[mid_attn]
        read, mlp_varies = (state, varies) if parallel else (mid, mid_varies)
        mlp = self._overwrite("mlp", read, len(mlp_varies))

        out, (out_mid, out_mlp) = _number(mid, mlp)
        out_varies = mid_varies[out_mid] | self._with_given(mlp_varies)[out_mlp]
        out, out_varies, out_token, terms, out_given = self._leave(out, out_varies, mid_input[out_mid])
        values = LayerValues(
            inputs=self.inputs,
            attn_run=attn_run,
            attn_token=attn_token,
            attn_varies=attn_varies,
            mixes=mixes,
            mid_input=mid_input,
            mid_attn=mid_attn,
            mid_varies=mid_varies,
            mlp_varies=mlp_varies,
            out_mid=out_mid[terms],
            out_mlp=out_mlp[terms],
            out_given=out_given,
            out_varies=out_varies,
            captured={site: self._capture(site, at) for site, at in (("attn", attn), ("mlp", mlp), ("hidden", out))},
        )
        return values, LayerInputs(out, out_token, out_varies)

    def _with_given(self, varies: np.ndarray) -> np.ndarray:
        return np.concatenate([varies, self.given_varies])

    def _overwrites(self, site: str) -> Overwrites | None:
        """Those at a site of this layer, if there are any."""
        here = self.now & (self.experiment.overwrites.site == SITES.index(site))
        return self.experiment.overwrites[here] if here.any() else None

    def _sources(self, o: Overwrites, values: np.ndarray, count: int) -> np.ndarray:
        """The number of each overwrite's source among ``count`` values with the given ones after them."""
        runs = values[self.row_of[np.maximum(o.source, 0)], o.source_token]
        return np.where(o.source >= 0, runs, count + ZERO - o.source)

    def _overwrite(self, site: str, values: np.ndarray, count: int) -> np.ndarray:
        o = self._overwrites(site)
        if o is None:
            return values
        changed = values.copy()
        changed[self.row_of[o.run], o.token] = self._sources(o, values, count)
        return changed

    def _mix(self, prefix: np.ndarray, attn_varies: np.ndarray) -> tuple[np.ndarray, Mixes]:
        """Overwrite single heads: the heads' outputs are numbered anew for every set of overwritten heads."""
        none = np.empty(0, dtype=np.int64)
        o = self._overwrites("head")
        if o is None:
            return prefix, Mixes(none, none, none, none, none.astype(bool))
        count = len(attn_varies)
        cells, number = np.unique(self.row_of[o.run] * prefix.shape[1] + o.token, return_inverse=True)
        run, token = np.divmod(cells, prefix.shape[1])
        patched = np.full((len(cells), int(o.head.max()) + 1), -1)
        patched[number, o.head] = self._sources(o, prefix, count)
        base = prefix[run, token]
        patched[patched == base[:, None]] = -1
        run, token, base, patched = (column[(patched >= 0).any(1)] for column in (run, token, base, patched))
        distinct, which = np.unique(np.column_stack([base, patched]), axis=0, return_inverse=True)
        mixed = prefix.copy()
        mixed[run, token] = count + which.ravel()

        base, patches = distinct[:, 0], distinct[:, 1:]
        row, head = np.nonzero(patches >= 0)
        source = patches[row, head]
        varies = attn_varies[base].copy()
        np.logical_or.at(varies, row, self._with_given(attn_varies)[source])
        return mixed, Mixes(base, row, head, source, varies)

    def _leave(
        self, out: np.ndarray, varies: np.ndarray, mid_input: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Overwrite the layer's output. Values from another token, or given ones, are numbered anew for the token that
        they come to, since the next layer treats them by their position.

        Returns the numbers (A, T); of each: whether it varies, its token, the sum behind it, and its given source.
        """
        count, T = len(varies), out.shape[1]
        o = self._overwrites("hidden")
        out = self._overwrite("hidden", out, count)
        if o is None or ((o.source >= 0) & (o.source_token == o.token)).all():
            return out, varies, self.inputs.token[mid_input], np.arange(count), np.zeros(count, dtype=np.int64)
        distinct, number = np.unique(out * T + np.arange(T), return_inverse=True)
        terms, token = np.divmod(distinct, T)
        computed = np.where(terms < count, terms, 0)
        source = np.where(terms < count, 0, count + ZERO - terms)
        return number.reshape(out.shape), self._with_given(varies)[terms], token, computed, source

    def _capture(self, site: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        c = self.experiment.captures
        number = np.flatnonzero((c.site == SITES.index(site)) & (c.layer == self.layer))
        return number, values[self.row_of[c.run[number]], c.token[number]]


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
        values, previous = distinct(key)
        prefix[:, token] = previous + offset
        firsts.append(np.flatnonzero(np.diff(np.maximum.accumulate(previous), prepend=-1)) * T + token)
        offset += len(values)
    return prefix, np.concatenate(firsts)


def _number(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Number the distinct pairs of two arrays (A, T): the numbers (A, T), and the pair behind each number."""
    width = int(right.max()) + 1
    values, numbers = distinct(left * width + right)
    return numbers, np.divmod(values, width)


def distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of an int64 array, in the order in which they first come; and the number of each among them,
    in the array's shape. Hashing takes a tenth of the time that sorting takes."""
    encoded = pa.array(keys.ravel()).dictionary_encode()
    return encoded.dictionary.to_numpy(), encoded.indices.to_numpy().astype(np.int64).reshape(keys.shape)
