"""Collects second moments: texts as packed pieces through the layers, the products of each layer's keys added up."""

from __future__ import annotations

import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.moments.files import MomentValues, read_sums, write_sums
from causalcone.engine.edit.moments.identity import Identity, key_width
from causalcone.engine.edit.moments.sampled import SOURCE, sampled_texts
from causalcone.engine.edit.runs.layers import Layers
from causalcone.engine.edit.runs.packed_runs import Runs, Text
from causalcone.engine.errors import ExperimentError, MemoryBudgetError
from causalcone.engine.memory import fitting
from causalcone.engine.run.session import Session
from causalcone.kernels.tiles import Tiles
from causalcone.kernels.transfer import send

Progress = Callable[[int, int | None], None]
Piece = tuple[int, ...]

TOKENS_PER_COMPONENT = 10
LENGTH = 512
CHUNK = 1024
"""Keys in one product: few enough for its sums in float32 to be good to 2e-7, enough for it to be worth adding up."""

MAX_ROWS_CPU, MAX_ROWS = 8192, 65_536
"""Tokens of a pass beyond which nothing is gained; smaller passes report and stop sooner."""

SAVE_EVERY = 60.0
"""Seconds between files of ``resume``; longer, where writing one takes longer than a tenth of it."""

_STRIPS, _SMALLEST_STRIP = 8, 64
_CHECKED_TOKENS = 32


class FewTokens(UserWarning):
    """The texts had ``found`` tokens, and ``wanted`` were asked for."""

    def __init__(self, found: int, wanted: int) -> None:
        self.found, self.wanted = found, wanted
        super().__init__(
            f"the texts ended after {found:,} of {wanted:,} tokens; the moments are of these, give more texts for more"
        )


@dataclass(frozen=True)
class _Plan:
    """A collection: its layers, the number of tokens (None: all), the most tokens of a piece, and the keys' width; the
    most rows of a pass, its tiles, and the device of the sums."""

    layers: tuple[int, ...]
    tokens: int | None
    length: int
    width: int
    rows: int
    tiles: Tiles
    device: torch.device

    @classmethod
    def of(cls, session: Session, layers: Sequence[int] | None, tokens: int | str | None, length: int | None) -> _Plan:
        sizes = session.sizes
        layers = range(sizes.depth) if layers is None else sorted(set(layers))
        wrong = [layer for layer in layers if not 0 <= layer < sizes.depth]
        if wrong or not layers:
            names = ", ".join(map(str, wrong)) or "none"
            raise ExperimentError(f"the layers {names} were chosen; the model's are 0 to {sizes.depth - 1}")
        width = key_width(session.architecture, layers[0])
        if tokens is None:
            tokens = TOKENS_PER_COMPONENT * width
        if tokens != "all" and (not isinstance(tokens, int) or tokens < 1):
            raise ExperimentError(f"tokens is {tokens!r}; give a positive number, or 'all'")
        length = min(LENGTH, sizes.positions) if length is None else length
        if not 1 <= length <= sizes.positions:
            raise ExperimentError(f"length is {length!r}; give 1 to {sizes.positions}, the model's positions")
        passes = _largest_passes(session, len(layers), length, width)
        return cls(tuple(layers), None if isinstance(tokens, str) else tokens, length, width, *passes)


def _largest_passes(session: Session, layers: int, length: int, width: int) -> tuple[int, Tiles, torch.device]:
    """The rows and tiles of the largest passes that fit the memory budget, and the device of the sums."""
    sizes, budget = session.sizes, session.budget()
    itemsize, wide = session.dtype.itemsize, max(4, session.dtype.itemsize)
    on_cpu = session.device.type == "cpu"
    sums = 8 * width**2 * layers
    elsewhere = not on_cpu and sums > budget.for_rows // 2
    at_once = sizes.heads // sizes.kv_heads if on_cpu else sizes.heads
    score = 4 * wide * at_once * length  # for a key: its scores, their mask and softmax
    heads, kv = sizes.heads * sizes.head_dim, 2 * sizes.kv_heads * sizes.head_dim
    row = itemsize * (8 * sizes.hidden + 2 * kv + 4 * heads + 3 * width) + 32
    product = width * (wide * (CHUNK + 2 * _strip(width)) + 8 * elsewhere * _strip(width))
    least = length * (row + score) + product + (0 if elsewhere else sums)
    left = budget.for_rows - least
    if left < 0:
        needed = max(budget.fixed + least, 2 * least)  # tiles take up to half of a budget
        raise MemoryBudgetError(
            f"the moments of {layers} layers need {needed / 2**20 + 0.05:.1f} MiB, of which their sums are "
            f"{sums / 2**20:.1f} MiB, the budget is {budget.total / 2**20:.1f} MiB; give more memory, fewer layers at "
            "a time or a shorter length"
        )
    keys = min(budget.tiles.keys, length + left // 4 // score)
    rows = min(MAX_ROWS_CPU if on_cpu else MAX_ROWS, length + (left - (keys - length) * score) // row)
    return rows, replace(budget.tiles, keys=keys), torch.device("cpu") if elsewhere else session.device


@dataclass
class Sums:
    """Sums so far: by layer that of k k^T (inner, inner) in float64, of which the blocks from the diagonal on count;
    the number of tokens; their ids' checksum; whole: all layers have the same tokens; path: the file of an unfinished
    collection, if any; of: what is collected, of which model."""

    by_layer: dict[int, Tensor]
    path: Path | None = None
    of: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    ids: int = 0
    whole: bool = True
    due: float = 0.0
    saved: int = 0

    def add(self, layer: int, keys: Tensor) -> None:
        """Add the products of keys (R, inner), strip by strip: a symmetric sum needs little more than half of them.
        Where the sum is on another device, a strip goes there once."""
        total, width = self.by_layer[layer], keys.shape[1]
        dtype = torch.promote_types(keys.dtype, torch.float32)
        for start in range(0, width, _strip(width)):
            strip = total[start : start + _strip(width), start:]
            here = strip if strip.device == keys.device else torch.zeros_like(strip, device=keys.device)
            for rows in keys.split(CHUNK):
                right = rows[:, start:].to(dtype)
                here += right[:, : len(strip)].T @ right
            if here is not strip:
                strip += here.to(strip.device)

    def count(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            self.tokens += len(piece)
            self.ids = zlib.crc32(np.asarray(piece, dtype=np.int64).tobytes(), self.ids)

    def take(self, layer: int, dtype: torch.dtype) -> Tensor:
        """The mean (inner, inner) of a layer, whose sum is dropped."""
        upper = self.by_layer.pop(layer).cpu().div_(self.tokens).triu_()
        mean = (upper + upper.triu(1).T).to(dtype)
        if not torch.isfinite(mean).all():
            raise ExperimentError(f"the keys of layer {layer} overflow in the dtype of the pass; collect in float32")
        return mean

    def load(self, pieces: Iterator[Piece]) -> None:
        """Go on from the file, where there is one, after the pieces that it counted; refuses others."""
        self.due = time.monotonic() + SAVE_EVERY
        if self.path is None or not self.path.exists():
            return
        by_layer, tokens, ids = read_sums(self.path, self.of)
        while self.tokens < tokens and (piece := next(pieces, ())):
            self.count([piece])
        if (self.tokens, self.ids) != (tokens, ids):
            raise ExperimentError(
                f"the first {tokens:,} tokens of these texts are not those that {self.path} counted: the texts or the "
                "tokenizer are others, or another number of tokens was asked for; go on as it was begun, or delete it "
                "to begin anew"
            )
        for layer, total in self.by_layer.items():
            total.copy_(by_layer[layer])
        self.saved = tokens

    def save(self) -> None:
        """Write the sums if there are new ones, unless a pass was interrupted midway."""
        if self.path is not None and self.whole and self.tokens > self.saved:
            begun = time.monotonic()
            write_sums(self.by_layer, self.tokens, self.ids, self.of, self.path)
            self.saved, now = self.tokens, time.monotonic()
            self.due = now + max(SAVE_EVERY, 10 * (now - begun))


def collect(
    session: Session,
    texts: Iterable[str | Mapping[str, Any]] | None = None,
    layers: Sequence[int] | None = None,
    tokens: int | str | None = None,
    *,
    source: str | None = None,
    length: int | None = None,
    progress: Progress | None = None,
    resume: str | Path | None = None,
) -> MomentValues:
    """The fields of ``Moments``; as ``Moments.collect``, in full float32 whatever the session computes in."""
    if isinstance(texts, (str, Mapping)):
        raise ExperimentError(f"texts is a {type(texts).__name__}; give a list of texts, or another iterable of them")
    plan = _Plan.of(session, layers, tokens, length)
    if texts is None:
        if plan.tokens is None:
            raise ExperimentError("a model writes texts without end; say how many tokens to take, or give texts")
        texts, source = sampled_texts(session), source or SOURCE
    identity = Identity.of(session.architecture, plan.layers)
    described = {"choice of layers": plan.layers, "length": plan.length, "dtype": str(session.dtype)}
    sums = Sums(
        {n: torch.zeros(plan.width, plan.width, dtype=torch.float64, device=plan.device) for n in plan.layers},
        None if resume is None else Path(resume),
        {**described, "model": {**vars(identity), "name": ""}},
    )
    pieces = _pieces(texts, session, plan)
    sums.load(pieces)
    try:
        _count(session, plan, pieces, sums, progress)
    finally:
        sums.save()
    if not sums.tokens:
        raise ExperimentError("the texts hold no tokens; give texts that the model can read")
    if plan.tokens is not None and sums.tokens < plan.tokens:
        warnings.warn(FewTokens(sums.tokens, plan.tokens), stacklevel=3)
    dtype = torch.promote_types(session.dtype, torch.float32)
    matrices = {layer: sums.take(layer, dtype) for layer in plan.layers}
    return matrices, dict.fromkeys(plan.layers, sums.tokens), source, identity


def _count(session: Session, plan: _Plan, pieces: Iterator[Piece], sums: Sums, progress: Progress | None) -> None:
    layers = Layers(session.architecture, plan.tiles, session.dtype, session.device)
    verified = False
    for packed in fitting(pieces, len, plan.rows):
        if not verified:
            session.verify(packed[0][:_CHECKED_TOKENS])
            verified = True
        sums.whole = False
        with session.computing(full=True):
            _run(layers, packed, sums)
        sums.count(packed)
        sums.whole = True
        if progress is not None:
            progress(sums.tokens, plan.tokens)
        if time.monotonic() >= sums.due:
            sums.save()


@torch.no_grad()
def _run(layers: Layers, packed: Sequence[Piece], sums: Sums) -> None:
    """One pass, up to the last layer with a sum."""
    texts = sorted(map(Text, packed), key=len)
    runs = send(Runs.whole(np.array([len(text) for text in texts])), layers.device)
    rows = layers.enter(texts)
    for layer in range(max(sums.by_layer) + 1):
        passed = layers.advance(layers.block(layer), rows, runs, keep_keys=layer in sums.by_layer)
        if passed.keys is not None:
            sums.add(layer, passed.keys)
        rows = passed.out
        del passed  # frees its other rows


def _pieces(texts: Iterable[str | Mapping[str, Any]], session: Session, plan: _Plan) -> Iterator[Piece]:
    """The token ids of texts in pieces, as many tokens as are wanted, the last piece cut."""
    left = sys.maxsize if plan.tokens is None else plan.tokens
    vocabulary = session.sizes.vocabulary
    for number, text in enumerate(texts):
        words = text.get("text") if isinstance(text, Mapping) else text
        if not isinstance(words, str):
            raise ExperimentError(
                f"text {number} is a {type(text).__name__}; give strings, or mappings whose 'text' is one"
            )
        ids = tuple(session.tokenizer(words, verbose=False)["input_ids"])
        if ids and max(ids) >= vocabulary:
            raise ExperimentError(
                f"text {number}: token id {max(ids)} is outside the model's vocabulary of {vocabulary}; "
                "use the model's own tokenizer"
            )
        for start in range(0, len(ids), plan.length):
            piece = ids[start : start + plan.length][:left]
            left -= len(piece)
            yield piece
            if not left:
                return


def _strip(width: int) -> int:
    return max(_SMALLEST_STRIP, -(-width // _STRIPS))
