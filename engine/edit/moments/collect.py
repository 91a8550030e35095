"""Collects second moments: texts as packed pieces through the layers, the products of each layer's keys added up."""

from __future__ import annotations

import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.moments.files import MomentValues, read_sums, write_sums
from causalcone.engine.edit.moments.identity import Identity, key_width
from causalcone.engine.edit.runs.layers import Layers
from causalcone.engine.edit.runs.packed_runs import Runs, Text
from causalcone.engine.errors import ExperimentError, MemoryBudgetError
from causalcone.engine.memory import fitting
from causalcone.engine.run.session import Session
from causalcone.kernels.tiles import Tiles

Progress = Callable[[int, int | None], None]

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
class CollectSpec:
    layers: tuple[int, ...]
    tokens: int | None
    length: int
    width: int

    @classmethod
    def of(
        cls, session: Session, layers: Sequence[int] | None, tokens: int | str | None, length: int | None
    ) -> CollectSpec:
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
        return cls(tuple(layers), None if isinstance(tokens, str) else tokens, length, width)


@dataclass
class Sums:
    """Sums so far: by layer that of k k^T (inner, inner) in float64, of which the blocks from the diagonal on count;
    the number of tokens; the checksum of their ids. ``whole``: every layer has the same tokens."""

    by_layer: dict[int, Tensor]
    tokens: int = 0
    ids: int = 0
    whole: bool = True

    def add(self, layer: int, keys: Tensor) -> None:
        """Add the products of keys (R, inner), strip by strip: a symmetric sum needs little more than half of them."""
        total, width = self.by_layer[layer], keys.shape[1]
        for rows in keys.split(CHUNK):
            wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
            for start in range(0, width, _strip(width)):
                strip = slice(start, start + _strip(width))
                total[strip, start:] += (wide[:, strip].T @ wide[:, start:]).to(total.device)

    def take(self, layer: int, dtype: torch.dtype) -> Tensor:
        """The mean (inner, inner) of a layer, whose sum is dropped."""
        upper = self.by_layer.pop(layer).cpu().div_(self.tokens).triu_()
        mean = (upper + upper.triu(1).T).to(dtype)
        if not torch.isfinite(mean).all():
            raise ExperimentError(f"the keys of layer {layer} overflow in the dtype of the pass; collect in float32")
        return mean


class Checkpoint:
    """The file of an unfinished collection. of: a description of the collection and the model."""

    def __init__(self, path: Path, of: Mapping[str, Any]) -> None:
        self.path, self.of = path, of
        self.due = time.monotonic() + SAVE_EVERY
        self.saved = 0

    def load(self, sums: Sums) -> None:
        """Go on from the file, where there is one."""
        if not self.path.exists():
            return
        by_layer, sums.tokens, sums.ids = read_sums(self.path, self.of)
        for layer, total in sums.by_layer.items():
            total.copy_(by_layer[layer])
        self.saved = sums.tokens

    def save(self, sums: Sums) -> None:
        """Write the sums if there are new ones, unless a pass was interrupted midway."""
        if sums.whole and sums.tokens > self.saved:
            begun = time.monotonic()
            write_sums(sums.by_layer, sums.tokens, sums.ids, self.of, self.path)
            self.saved = sums.tokens
            now = time.monotonic()
            self.due = now + max(SAVE_EVERY, 10 * (now - begun))

    def save_if_due(self, sums: Sums) -> None:
        if time.monotonic() >= self.due:
            self.save(sums)


@dataclass(frozen=True)
class Frame:
    """How passes are run: the most rows of one, tiles, and the device of the sums."""

    rows: int
    tiles: Tiles
    sums: torch.device

    @classmethod
    def of(cls, session: Session, spec: CollectSpec) -> Frame:
        """The largest passes that fit the memory budget; ``MemoryBudgetError`` where not even a piece does."""
        sizes, budget = session.sizes, session.budget()
        itemsize, wide = session.dtype.itemsize, max(4, session.dtype.itemsize)
        on_cpu = session.device.type == "cpu"
        sums = 8 * spec.width**2 * len(spec.layers)
        elsewhere = not on_cpu and sums > budget.for_rows // 2
        at_once = sizes.heads // sizes.kv_heads if on_cpu else sizes.heads
        score = 4 * wide * at_once * spec.length  # for a key: its scores, their mask and softmax
        heads, kv = sizes.heads * sizes.head_dim, 2 * sizes.kv_heads * sizes.head_dim
        row = itemsize * (8 * sizes.hidden + 2 * kv + 4 * heads + 3 * spec.width) + 32
        product = wide * spec.width * (CHUNK + 2 * _strip(spec.width))
        least = spec.length * (row + score) + product + (0 if elsewhere else sums)
        left = budget.for_rows - least
        if left < 0:
            needed = max(budget.fixed + least, 2 * least)  # tiles take up to half of a budget
            raise MemoryBudgetError(
                f"the moments of {len(spec.layers)} layers need {needed / 2**20 + 0.05:.1f} MiB, of which their sums "
                f"are {sums / 2**20:.1f} MiB, the budget is {budget.total / 2**20:.1f} MiB; give more memory, fewer "
                "layers at a time or a shorter length"
            )
        keys = min(budget.tiles.keys, spec.length + left // 4 // score)
        rows = min(MAX_ROWS_CPU if on_cpu else MAX_ROWS, spec.length + (left - (keys - spec.length) * score) // row)
        return cls(rows, replace(budget.tiles, keys=keys), torch.device("cpu") if elsewhere else session.device)


def collect(
    session: Session,
    texts: Iterable[str | Mapping[str, Any]],
    layers: Sequence[int] | None = None,
    tokens: int | str | None = None,
    *,
    source: str | None = None,
    length: int | None = None,
    progress: Progress | None = None,
    resume: str | Path | None = None,
) -> MomentValues:
    if isinstance(texts, (str, Mapping)):
        raise ExperimentError(f"texts is a {type(texts).__name__}; give a list of texts, or another iterable of them")
    spec = CollectSpec.of(session, layers, tokens, length)
    frame = Frame.of(session, spec)
    identity = Identity.of(session.architecture, spec.layers)
    sums = Sums({n: torch.zeros(spec.width, spec.width, dtype=torch.float64, device=frame.sums) for n in spec.layers})
    pieces = first_tokens(pieces_of(texts, session.tokenizer, spec.length, session.sizes.vocabulary), spec.tokens)
    checkpoint = None
    if resume is not None:
        described = {"choice of layers": spec.layers, "length": spec.length, "dtype": str(session.dtype)}
        checkpoint = Checkpoint(Path(resume), {**described, "model": {**vars(identity), "name": ""}})
        checkpoint.load(sums)
        _skip(pieces, sums, checkpoint.path)
    try:
        _count(session, spec, frame, pieces, sums, progress, checkpoint)
    finally:
        if checkpoint is not None:
            checkpoint.save(sums)
    if not sums.tokens:
        raise ExperimentError("the texts hold no tokens; give texts that the model can read")
    if spec.tokens is not None and sums.tokens < spec.tokens:
        warnings.warn(FewTokens(sums.tokens, spec.tokens), stacklevel=3)
    dtype = torch.promote_types(session.dtype, torch.float32)
    matrices = {layer: sums.take(layer, dtype) for layer in spec.layers}
    return matrices, dict.fromkeys(spec.layers, sums.tokens), source, identity


def _count(
    session: Session,
    spec: CollectSpec,
    frame: Frame,
    pieces: Iterator[tuple[int, ...]],
    sums: Sums,
    progress: Progress | None,
    checkpoint: Checkpoint | None,
) -> None:
    """Add all pieces to the sums, pass by pass."""
    layers = Layers(session.architecture, frame.tiles, session.dtype, session.device)
    verified = False
    for packed in fitting(pieces, len, frame.rows):
        if not verified:
            session.verify(packed[0][:_CHECKED_TOKENS])
            verified = True
        sums.whole = False
        with session.computing(full=True):
            _run(layers, packed, sums)
        sums.tokens += sum(map(len, packed))
        sums.ids = _checksum(packed, sums.ids)
        sums.whole = True
        if progress is not None:
            progress(sums.tokens, spec.tokens)
        if checkpoint is not None:
            checkpoint.save_if_due(sums)


@torch.no_grad()
def _run(layers: Layers, packed: Sequence[tuple[int, ...]], sums: Sums) -> None:
    """One pass, up to the last layer with a sum."""
    texts = sorted(map(Text, packed), key=len)
    runs = Runs.whole(np.array([len(text) for text in texts]), layers.device)
    rows = layers.enter(texts)
    for layer in range(max(sums.by_layer) + 1):
        rows = _advance(layers, layer, rows, runs, sums)


def _advance(layers: Layers, layer: int, rows: Tensor, runs: Runs, sums: Sums) -> Tensor:
    """The output of a layer; its other rows are freed on return."""
    passed = layers.advance(layers.block(layer), rows, runs, keep_keys=layer in sums.by_layer)
    if passed.keys is not None:
        sums.add(layer, passed.keys)
    return passed.out


def pieces_of(
    texts: Iterable[str | Mapping[str, Any]], tokenizer: Any, length: int, vocabulary: int
) -> Iterator[tuple[int, ...]]:
    """The token ids of texts, in pieces of at most ``length``."""
    for number, text in enumerate(texts):
        words = text.get("text") if isinstance(text, Mapping) else text
        if not isinstance(words, str):
            raise ExperimentError(
                f"text {number} is a {type(text).__name__}; give strings, or mappings whose 'text' is one"
            )
        ids = tuple(tokenizer(words, verbose=False)["input_ids"])
        if ids and max(ids) >= vocabulary:
            raise ExperimentError(
                f"text {number}: token id {max(ids)} is outside the model's vocabulary of {vocabulary}; "
                "use the model's own tokenizer"
            )
        for start in range(0, len(ids), length):
            yield ids[start : start + length]


def first_tokens(pieces: Iterator[tuple[int, ...]], tokens: int | None) -> Iterator[tuple[int, ...]]:
    """The first ``tokens`` tokens of pieces, the last piece cut; None for all."""
    if tokens is None:
        yield from pieces
        return
    for piece in pieces:
        yield piece[:tokens]
        tokens -= len(piece)
        if tokens <= 0:
            return


def _skip(pieces: Iterator[tuple[int, ...]], sums: Sums, path: Path) -> None:
    """Skip the pieces that are counted already; refuses others."""
    seen = ids = 0
    while seen < sums.tokens:
        piece = next(pieces, ())
        if not piece:
            break
        seen += len(piece)
        ids = _checksum([piece], ids)
    if (seen, ids) != (sums.tokens, sums.ids):
        raise ExperimentError(
            f"the first {sums.tokens:,} tokens of these texts are not those that {path} counted: the texts or the "
            "tokenizer are others, or another number of tokens was asked for; go on as it was begun, or delete it to "
            "begin anew"
        )


def _checksum(pieces: Iterable[tuple[int, ...]], before: int) -> int:
    for piece in pieces:
        before = zlib.crc32(np.asarray(piece, dtype=np.int64).tobytes(), before)
    return before


def _strip(width: int) -> int:
    """Columns of a product's left side."""
    return max(_SMALLEST_STRIP, -(-width // _STRIPS))
