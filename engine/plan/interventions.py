"""The vocabulary of experiments: base runs, and the runs that overwriting their values forks from them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TypeVar

import numpy as np

SITES = ("head", "attn", "mlp", "hidden")
"""Where a layer's value can be overwritten: the heads' outputs before the output projection, what attention and MLP
add to the residual stream, and the layer's output."""

CLEAN, CORRUPTED = 0, 1
"""The base runs of a fact whose subject is corrupted."""

ZERO = -1
"""As a source: the value is zero. ``given(i)`` is the i-th vector given with a fact."""


Number = TypeVar("Number", int, np.ndarray)


def given(vector: Number) -> Number:
    """The source number of a given vector, and the vector's number of such a source."""
    return -2 - vector


def _none() -> np.ndarray:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Base:
    """A run that starts from embeddings: those of a fact's ``prompt`` (the first is its own), with the noise of a
    ``draw`` added to the noised tokens, or put in their place."""

    prompt: int = 0
    draw: int | None = None
    replace: bool = False


CLEAN_AND_CORRUPTED = (Base(), Base(draw=0))


@dataclass(frozen=True)
class Overwrites:
    """Interventions as columns: at ``site`` of layers ``start`` to ``end`` (half-open), ``token`` of ``run`` takes the
    value that the base run ``source`` has there at ``source_token``, or a given one (``ZERO``, ``given``). One row is
    one intervention; a run may have several, of which later rows win.

    Fields are int arrays of one length (M,); ``site`` indexes ``SITES``; ``head`` is the head's number at the site
    ``head`` and -1 elsewhere.
    """

    site: np.ndarray
    start: np.ndarray
    end: np.ndarray
    run: np.ndarray
    token: np.ndarray
    source: np.ndarray
    source_token: np.ndarray
    head: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> Overwrites:
        return Overwrites(*(column[rows] for column in vars(self).values()))

    def __len__(self) -> int:
        return len(self.site)

    @classmethod
    def of(
        cls,
        site: np.ndarray,
        start: np.ndarray,
        end: np.ndarray,
        run: np.ndarray,
        token: np.ndarray,
        source: int | np.ndarray,
        source_token: np.ndarray | None = None,
        head: int | np.ndarray = -1,
    ) -> Overwrites:
        """Columns from arrays (M,) and numbers that hold for every row; values come from the same token by default."""
        columns = (site, start, end, run, token, source, token if source_token is None else source_token, head)
        return cls(*(np.array(column, dtype=np.int64) for column in np.broadcast_arrays(*columns)))

    @classmethod
    def none(cls) -> Overwrites:
        return cls(*(_none() for _ in fields(cls)))

    @classmethod
    def joined(cls, *overwrites: Overwrites) -> Overwrites:
        return cls(*map(np.concatenate, zip(*(vars(columns).values() for columns in overwrites), strict=True)))


@dataclass(frozen=True)
class Captures:
    """Values to hand out, as columns (n,): what ``run`` has at ``site`` of ``layer`` at ``token``."""

    site: np.ndarray = field(default_factory=_none)
    layer: np.ndarray = field(default_factory=_none)
    run: np.ndarray = field(default_factory=_none)
    token: np.ndarray = field(default_factory=_none)

    def __len__(self) -> int:
        return len(self.site)


@dataclass(frozen=True, eq=False)
class Experiment:
    """The runs of one fact: base runs, and branch runs that overwrites fork from them.

    bases: what each base run reads; run b is ``bases[b]``. branch_base (B,): the base run of each branch; branch i is
    run ``len(bases) + i``. varying_vectors: for each given vector, whether every sample has its own. logits (n, 2):
    run and token of every row whose logits are handed out.
    """

    bases: tuple[Base, ...]
    branch_base: np.ndarray
    overwrites: Overwrites
    varying_vectors: tuple[bool, ...] = ()
    captures: Captures = field(default_factory=Captures)
    logits: np.ndarray = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))

    @property
    def branches(self) -> int:
        return len(self.branch_base)

    @cached_property
    def base(self) -> np.ndarray:
        """(R,) the base run of each run."""
        return np.concatenate([np.arange(len(self.bases)), self.branch_base])

    @cached_property
    def forks(self) -> np.ndarray:
        """(R,) the first layer at which each run is overwritten; beyond every layer for base runs."""
        first = np.full(len(self.base), np.iinfo(np.int64).max)
        np.minimum.at(first, self.overwrites.run, self.overwrites.start)
        return first

    @cached_property
    def digest(self) -> bytes:
        """What plans of equal experiments are found by."""
        captures, overwrites = vars(self.captures).values(), vars(self.overwrites).values()
        content = hashlib.blake2b(repr((self.bases, self.varying_vectors)).encode())
        for column in (self.branch_base, *overwrites, *captures, self.logits):
            content.update(column.tobytes() + b"|")
        return content.digest()

    def indices_of(self, branches: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The runs, captures and logits of the experiment on some of the branches, among those of the whole."""
        first = len(self.bases)
        runs = np.concatenate([np.arange(first), first + np.arange(branches.start, branches.stop)])
        captured, logits = (np.flatnonzero(np.isin(of, runs)) for of in (self.captures.run, self.logits[:, 0]))
        return runs, captured, logits

    def subset(self, branches: range) -> Experiment:
        """The experiment on some of the branches, numbered anew."""
        if len(branches) == self.branches:
            return self
        runs, captured, logits = self.indices_of(branches)
        renumbered = np.full(len(self.base), -1)
        renumbered[runs] = np.arange(len(runs))
        rest = self.overwrites[renumbered[self.overwrites.run] >= 0]
        c = self.captures
        return replace(
            self,
            branch_base=self.branch_base[branches.start : branches.stop],
            overwrites=replace(rest, run=renumbered[rest.run]),  # sources are base runs or given: their numbers stay
            captures=Captures(c.site[captured], c.layer[captured], renumbered[c.run[captured]], c.token[captured]),
            logits=np.stack([renumbered[self.logits[logits, 0]], self.logits[logits, 1]], axis=1),
        )
