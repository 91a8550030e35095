"""Which values of a layer's stages are needed, and where their rows lie: what plans are compiled with."""

from __future__ import annotations

import numpy as np

from causalcone.engine.plan.cone import LayerValues
from causalcone.engine.plan.plan import Gather, Given, Mix, Rows, Segment


def marked(size: int, *numbers: np.ndarray) -> np.ndarray:
    """(size,) true at the numbers."""
    mask = np.zeros(size, dtype=bool)
    for number in numbers:
        mask[number] = True
    return mask


class Needed:
    """The values of a stage that are needed, in row order: those it computes, shared first, then those given (where
    ``source`` is negative), shared first.

    kept: their numbers; computed: those of the rows it computes; local: the row of each value, -1 if not needed.
    """

    def __init__(self, needed: np.ndarray, varies: np.ndarray, source: np.ndarray | None = None) -> None:
        source = np.zeros(len(needed), dtype=np.int64) if source is None else source
        order = [
            np.flatnonzero(needed & ((source < 0) == is_given) & (varies == varying))
            for is_given in (False, True)
            for varying in (False, True)
        ]
        counts = [len(part) for part in order]
        self.kept = np.concatenate(order)
        self.rows = Rows(*counts[:2])
        self.computed = self.kept[: self.rows.total]
        self.given = Given(Rows(*counts[2:]), source[self.kept[self.rows.total :]])
        self.local = np.full(len(needed), -1)
        self.local[self.kept] = np.arange(len(self.kept))

    def gather(self, source: Needed, value: np.ndarray) -> Gather:
        """Where each row that this stage computes finds its ``value`` among the source's rows."""
        return Gather(self.rows, source.local[value[self.computed]])


class NeededAttention:
    """What attention computes in a layer of which the outputs ``needed`` are read: segments of attention rows, mixes of
    their heads, given rows, and the queries and keys behind them.

    local: the row of each attention output, mixes and given ones behind the computed ones, -1 if not needed.
    """

    def __init__(self, values: LayerValues, given_varies: np.ndarray, *needed: np.ndarray) -> None:
        self.values = values
        self.count, mixes = len(values.attn_varies), values.mixes
        ends = self.count, self.count + len(mixes.base)
        read = marked(ends[1] + len(given_varies), *needed)
        self.mixes = Needed(read[ends[0] : ends[1]], mixes.varies)
        self.patches = np.flatnonzero(self.mixes.local[mixes.row] >= 0)
        sources = mixes.source[self.patches]
        self.attn = read[: self.count]
        self.attn |= marked(self.count, mixes.base[self.mixes.kept], sources[sources < self.count])
        self.given = Needed(read[ends[1] :], given_varies, -1 - np.arange(len(given_varies)))

        inputs = len(values.input_varies)
        self.query_of = values.state[values.attn_run, values.attn_token]
        self.queries = Needed(marked(inputs, self.query_of[self.attn]), values.input_varies)
        self.keys = Needed(marked(inputs, self._seen()), values.input_varies)
        self.rows = Rows(*(int((self.attn & (values.attn_varies == varies)).sum()) for varies in (False, True)))
        self.local = np.full(len(read), -1)
        self.local[ends[0] + self.mixes.kept] = self.rows.total + np.arange(len(self.mixes.kept))
        behind = self.rows.total + len(self.mixes.kept)
        self.local[ends[1] + self.given.kept] = behind + np.arange(len(self.given.kept))

    def _querying(self, attn: np.ndarray) -> np.ndarray:
        """(A, T) which of each run's tokens stand for an attention output, and which output that is (else -1)."""
        output = np.full(self.values.state.shape, -1)
        output[self.values.attn_run[attn], self.values.attn_token[attn]] = np.flatnonzero(attn)
        return output

    def _seen(self) -> np.ndarray:
        """The input rows whose keys and values the attention outputs see: all of a run's up to its last query."""
        querying = self._querying(self.attn) >= 0
        return self.values.state[np.logical_or.accumulate(querying[:, ::-1], axis=1)[:, ::-1]]

    def segments(self) -> tuple[Segment, ...]:
        """Batches of the runs that query for the same tokens; numbers the attention rows in the batches' order."""
        segments: list[Segment] = []
        first = 0
        for varying in (False, True):
            output = self._querying(self.attn & (self.values.attn_varies == varying))
            patterns, which = np.unique(output >= 0, axis=0, return_inverse=True)
            for index, pattern in enumerate(patterns):
                tokens = np.flatnonzero(pattern)
                if not len(tokens):
                    continue
                runs = np.flatnonzero(which.ravel() == index)
                outputs = output[np.ix_(runs, tokens)]
                self.local[outputs] = first + np.arange(outputs.size).reshape(outputs.shape)
                queries = self.queries.local[self.query_of[outputs]]
                keys = self.keys.local[self.values.state[runs, : tokens[-1] + 1]]
                segments.append(Segment(varying, first, tuple(tokens.tolist()), queries, keys))
                first += outputs.size
        return tuple(segments)

    def mix(self) -> Mix:
        """The mixes, once the segments have numbered the attention rows that they are put together from."""
        mixes = self.values.mixes
        source = mixes.source[self.patches]
        rows = np.where(source < self.count, self.local[np.minimum(source, self.count - 1)], self.count - 1 - source)
        base = Gather(self.mixes.rows, self.local[mixes.base[self.mixes.kept]])
        return Mix(base, self.mixes.local[mixes.row[self.patches]], mixes.head[self.patches], rows)
