"""The demo model's training batches: sentences packed into rows, and the masks that rows are trained under."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from causalcone.runners.demo.words import FILLERS
from causalcone.runners.demo.world import Sentence, World

BEFORE, EARLY_SUBJECT, LAST_SUBJECT, AFTER = range(4)  # a token's place in its sentence
SENTENCES_PER_FILLER = 15
SENTENCES_PER_TEXT = 4
BLOCKED = -1e4


@dataclass(frozen=True)
class Corpus:
    """Tokenized sentences end to end: each token's id, place and weight in the loss, and each sentence's bounds."""

    ids: NDArray[np.int64]
    places: NDArray[np.int64]
    weights: NDArray[np.float32]
    starts: list[int]
    ends: list[int]


@dataclass(frozen=True)
class TrainingBatch:
    """Rows of packed sentences; all tensors are (rows, tokens) but the masks. ``weights`` are those of a token as a
    prediction. ``closed`` and ``open`` are masks (rows, 1, tokens, tokens), added to the attention scores, for the
    layers in which later words may not read the subject, and those in which they may."""

    ids: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor
    closed: torch.Tensor
    open: torch.Tensor


@dataclass(frozen=True)
class Packing:
    """How many rows a batch has, of how many tokens, and of which sort. The sentences of an ``isolated`` row cannot see
    each other and each starts at position 0; other rows are running text, half of it begun with BOS. Rows are trained
    under masks but for the share ``unmasked``."""

    rows: int = 32
    tokens: int = 44
    isolated: float = 0.6
    unmasked: float = 0.2
    other_weight: float = 0.2  # of the words that are not answers


def tokenized(world: World, tokenizer: PreTrainedTokenizerFast, packing: Packing, lead: str) -> Corpus:
    """The world's sentences and some fillers, each after ``lead``: nothing to start a text with, a space inside it."""
    sentences = list(world.sentences())
    fillers = [lead + FILLERS[k % len(FILLERS)] for k in range(len(sentences) // SENTENCES_PER_FILLER)]
    encoded = tokenizer([*(lead + sentence.text for sentence in sentences), *fillers], return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    places, weights = [], []
    for index, tokens in enumerate(ids):
        place, answer = np.full(len(tokens), BEFORE), np.zeros(len(tokens), dtype=bool)
        if index < len(sentences):
            place, answer = _marked(sentences[index], np.array(offsets[index]) - len(lead))
        places.append(place)
        weights.append(np.where(answer, 1.0, packing.other_weight).astype(np.float32))
    ends = np.cumsum([len(tokens) for tokens in ids]).tolist()
    flat = np.array([token for tokens in ids for token in tokens])
    return Corpus(flat, np.concatenate(places), np.concatenate(weights), [0, *ends[:-1]], ends)


def batches(
    opening: Corpus, inner: Corpus, bos: int, packing: Packing, random: np.random.Generator
) -> Iterator[TrainingBatch]:
    """Batches without end, every sentence once per round. ``opening`` holds the sentences as they start a text,
    ``inner`` as they go on with one."""
    order: list[int] = []
    shape = (packing.rows, packing.tokens)
    while True:
        ids, positions = np.full(shape, bos), np.tile(np.arange(packing.tokens), (packing.rows, 1))
        places, weights = np.full(shape, BEFORE), np.zeros(shape, dtype=np.float32)
        segments = np.full(shape, -1)
        isolated = random.random(packing.rows) < packing.isolated
        begun = ~isolated & (random.random(packing.rows) < 0.5)
        masked = random.random(packing.rows) >= packing.unmasked
        for row in range(packing.rows):
            at, segment = int(begun[row]), 0
            while True:
                order = order or random.permutation(len(opening.starts)).tolist()
                source = opening if isolated[row] or segment == 0 else inner
                start, end = source.starts[order[-1]], source.ends[order[-1]]
                if at + end - start > packing.tokens:
                    break
                order.pop()
                put = (row, slice(at, at + end - start))
                ids[put], places[put], weights[put] = (
                    part[start:end] for part in (source.ids, source.places, source.weights)
                )
                segments[put] = segment
                if isolated[row]:
                    positions[put] = np.arange(end - start)
                at, segment = at + end - start, segment + 1
        weights[positions == 0] = 0  # nothing comes before the first word
        closed, opened = _masks(places, segments, isolated, masked)
        yield TrainingBatch(
            torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(weights), closed, opened
        )


def running_texts(world: World) -> list[str]:
    """All of the world's sentences in random order, always the same, as many to a text as there are in a row."""
    sentences = [sentence.text for sentence in world.sentences()]
    Random(0).shuffle(sentences)
    starts = range(0, len(sentences), SENTENCES_PER_TEXT)
    return [" ".join(sentences[start : start + SENTENCES_PER_TEXT]) for start in starts]


def _marked(sentence: Sentence, offsets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The place of each token in its sentence, and whether it belongs to the answer."""
    begins, ends = offsets.T
    place = np.full(len(offsets), BEFORE)
    place[ends > sentence.subject[0]] = EARLY_SUBJECT
    place[ends >= sentence.subject[1]] = LAST_SUBJECT
    place[begins >= sentence.subject[1]] = AFTER
    return place, (begins >= sentence.target[0]) & (ends <= sentence.target[1])


def _masks(
    places: NDArray[np.int64], segments: NDArray[np.int64], isolated: NDArray[np.bool_], masked: NDArray[np.bool_]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The additive masks of the layers closed and open to reading. In masked rows a subject's tokens see no word but
    the subject's, and what the words after it learn of it they learn from its last token, in the open layers only. So
    the model must gather the name at that token and look it up there: the early site that causal tracing finds and that
    editing changes."""
    reads, is_read = (lambda place: (places == place)[:, :, None]), (lambda place: (places == place)[:, None, :])
    same = segments[:, :, None] == segments[:, None, :]
    of_name = (places == EARLY_SUBJECT) | (places == LAST_SUBJECT)
    trained = same & masked[:, None, None]
    causal = np.tril(np.ones(same.shape[1:], dtype=bool)) & (same | ~isolated[:, None, None])
    opened = causal & ~(trained & reads(AFTER) & is_read(EARLY_SUBJECT))
    opened &= ~(trained & of_name[:, :, None] & ~of_name[:, None, :])
    closed = opened & ~(trained & reads(AFTER) & is_read(LAST_SUBJECT))
    return _additive(closed), _additive(opened)


def _additive(allowed: NDArray[np.bool_]) -> torch.Tensor:
    return torch.zeros(allowed.shape).masked_fill_(torch.from_numpy(~allowed), BLOCKED).unsqueeze(1)


def texts(world: World) -> Iterable[str]:
    """All the words the tokenizer must know, as they stand at the start of a text and inside it."""
    for text in (*(sentence.text for sentence in world.sentences()), *FILLERS * 2):
        yield text
        yield " " + text
