"""Tokenizers of every style that the supported models come with, trained in memory on a few sentences.

*Byte-level* ones (GPT-2's style) have a token for every byte. *SentencePiece's* (Llama's and Gemma's) write a space as
``▁``, fall back to bytes where a character is unknown, and differ in when they put a space before a text.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from helpers.models import FACTS, tokenizer as byte_level

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
PEOPLE = ("Ann Lee", "Bo", "Rome", "The Space Needle", "Danielle Darrieux")
ANSWERS = ("tennis", "golf", "Latin", "French", "in Seattle")
SENTENCES = [
    f"{fact.prompt.replace('{}', who)} {what} (it's)" for fact, who, what in itertools.product(FACTS, PEOPLE, ANSWERS)
]


@functools.cache
def trimmed() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose offsets leave out the spaces before words, as that of Pythia does."""
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@functools.cache
def sentencepiece(pieces: str, space: str, bos: bool = True) -> PreTrainedTokenizerFast:
    """``pieces`` are found by ``bpe`` or ``unigram``. ``space``: a text gets a space before it ``always`` or at its
    ``first`` piece, where it has none, or ``never``; in the ``legacy`` form it gets one in any case."""
    tokenizer = _trained(pieces)
    if space == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=space, split=pieces == "unigram")
    stripped = [] if space == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    if bos:
        tokenizer.post_processor = _begin_with("<s>", tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def of_class(cls: type[PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """A model family's own class of tokenizer, which begins every text with its BOS token."""
    model = json.loads(_trained("bpe").to_str())["model"]
    tokenizer = cls(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.backend_tokenizer.post_processor = _begin_with("<s>", tokenizer.backend_tokenizer)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "byte-level, bos": lambda: byte_level(bos=True),
    "byte-level, trimmed": trimmed,
    "single bytes": lambda: byte_level(vocabulary=257),
    **{
        f"{pieces}, {space}": functools.partial(sentencepiece, pieces, space)
        for pieces in ("bpe", "unigram")
        for space in ("always", "first", "never", "legacy")
    },
    "bpe, first, no bos": lambda: sentencepiece("bpe", "first", bos=False),
    "LlamaTokenizer": lambda: of_class(LlamaTokenizer),
    "GemmaTokenizer": lambda: of_class(GemmaTokenizer),
}


def bytes_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """What each token stands for in the text, read off the vocabulary; nothing for special tokens."""
    names = tokenizer.convert_ids_to_tokens(list(ids))
    read = _read_piece if "<0x00>" in tokenizer.get_vocab() else _read_byte_level
    return [b"" if name in tokenizer.all_special_tokens else read(name) for name in names]


def _read_piece(name: str) -> bytes:
    byte = re.fullmatch(r"<0x(..)>", name)
    return bytes.fromhex(byte[1]) if byte else name.replace("▁", " ").encode()


def _read_byte_level(name: str) -> bytes:
    """Byte-level names write bytes that are printable in Latin-1 as that character, and number the others from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return bytes(ord(letter) if ord(letter) < 256 else others[ord(letter) - 256] for letter in name)


def _trained(pieces: str) -> Tokenizer:
    """A vocabulary of pieces of words, every byte among them."""
    special = [*SPECIAL, *BYTES]
    if pieces == "bpe":
        tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.train_from_iterator(SENTENCES, trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["byte_fallback"] = True
    state["pre_tokenizer"] = None
    state["added_tokens"] = state["added_tokens"][: len(SPECIAL)]  # a text that spells a byte's name is no byte
    return Tokenizer.from_str(json.dumps(state))


def _begin_with(token: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, tokenizer.token_to_id(token))])
