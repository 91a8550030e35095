"""What the benchmarks run on: random models in the shapes of known ones, and prompts of known lengths."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2TokenizerFast, PreTrainedTokenizerFast

from causalcone import Fact

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Folder of counterfact_prompts.json and gpt2-tokenizer/."""

SHAPES = {
    "toy": {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50257},
    "GPT-2 small": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
    "GPT2-XL": {"n_layer": 48, "n_embd": 1600, "n_head": 25, "vocab_size": 50257},
}
"""All are GPT-2's."""

LENGTHS = (
    *((4, 4, 1), (4, 5, 1), (0, 4, 2), (0, 5, 5), (6, 1, 3), (4, 9, 1), (0, 6, 5), (0, 3, 3), (6, 1, 3), (0, 6, 3)),
    *((0, 2, 2), (0, 6, 4), (0, 4, 3), (0, 5, 3), (4, 7, 1), (0, 3, 2), (0, 2, 5), (4, 3, 1), (0, 3, 3), (0, 4, 2)),
)
"""Tokens before, in and after the subject of the first 20 CounterFact prompts; their targets are one token each."""


def gpt2(shape: dict[str, int]) -> GPT2Config:
    return GPT2Config(**shape, bos_token_id=0, eos_token_id=0)


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with transformers' random initialisation and frozen weights, made on the device and in the dtype."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def prompts(folder: Path, count: int, vocabulary: int) -> tuple[list[Fact], Any, str]:
    """The first CounterFact prompts, or generated ones where the folder is not there; their tokenizer, their source.

    Each has a counterfactual subject, one or two of those of the first 20 or more.
    """
    pool = max(len(LENGTHS), count)
    real = folder.is_dir()
    facts, tokenizer = counterfact(folder, pool) if real else generated(pool, vocabulary)
    facts = with_other_subjects(facts, tokenizer)[:count]
    n = len(facts)
    source = f"the first {n} of CounterFact" if real else f"{n} generated with the lengths of CounterFact's first 20"
    return facts, tokenizer, source


def smollm2(count: int) -> tuple[Any, Any, list[Fact], str]:
    """SmolLM2-135M-Instruct in float32 with frozen weights, its tokenizer, and the first real facts that it knows."""
    from causalcone import Tracer  # as here below, needs what is not installed everywhere
    from causalcone.engine.edit.texts.recall import known
    from causalcone.runners.real.relations import real_facts

    session = Tracer.from_pretrained("smollm2", dtype="float32").session
    facts = real_facts()[: 4 * count]
    right = known(session, [session.prompts.fact(fact) for fact in facts])
    chosen = [fact for fact, knows in zip(facts, right, strict=True) if knows][:count]
    model = session.model.requires_grad_(False)
    return model, session.tokenizer, chosen, f"the first {len(chosen)} of causalcone's real facts that it knows"


def counterfact(folder: Path, count: int) -> tuple[list[Fact], Any]:
    """The first CounterFact prompts and GPT-2's tokenizer."""
    from causalcone import load_facts  # needs what is not installed everywhere

    files = folder / "gpt2-tokenizer"
    tokenizer = GPT2TokenizerFast(vocab=str(files / "vocab.json"), merges=str(files / "merges.txt"))
    return load_facts(folder / "counterfact_prompts.json", limit=count), tokenizer


def generated(count: int, vocabulary: int) -> tuple[list[Fact], Any]:
    """Prompts of random words, one token each, and their tokenizer.

    The first 20 have the lengths of ``LENGTHS``. Every further 20 pair those texts with other of those subjects, so
    that the means stay and up to 400 pairs of lengths occur.
    """
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    draw = random.Random(0)

    def text(tokens: int) -> str:
        return " ".join(f"w{draw.randrange(vocabulary)}" for _ in range(tokens))

    facts = []
    for index in range(count):
        turn, place = divmod(index, len(LENGTHS))
        before, _, after = LENGTHS[place]
        _, subject, _ = LENGTHS[(place + turn) % len(LENGTHS)]
        prompt = f"{text(before)} {{}} {text(after)}".strip()
        facts.append(Fact(str(index), prompt, text(subject), text(1)))
    return facts, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def with_other_subjects(facts: Sequence[Fact], tokenizer: Any) -> list[Fact]:
    """The facts with a counterfactual subject each, of as many tokens: the subject of another fact, or those of two."""
    names = list(dict.fromkeys(fact.subject for fact in facts))
    candidates = [*names, *(" ".join(pair) for pair in itertools.permutations(names, 2))]

    def length(fact: Fact) -> int:
        return len(tokenizer(fact.text)["input_ids"])

    def other(fact: Fact) -> str:
        renamed = (replace(fact, subject=name) for name in candidates if name != fact.subject)
        return next(each.subject for each in renamed if length(each) == length(fact))

    return [replace(fact, counterfactual_subject=other(fact)) for fact in facts]


def describe_prompts(facts: Sequence[Fact], tokenizer: Any, source: str) -> dict[str, Any]:
    """Where prompts come from and how long they are; the subject's tokens are counted in its prompt."""
    tokens, subjects, starts = [], [], []
    for fact in facts:
        first, last = fact.subject_characters
        offsets = tokenizer(fact.text, return_offsets_mapping=True)["offset_mapping"]
        covered = [i for i, (begin, end) in enumerate(offsets) if begin < last and end > first]
        tokens.append(len(offsets))
        subjects.append(len(covered))
        starts.append(covered[0])

    def mean(values: list[int]) -> float:
        return sum(values) / len(values)

    means = {"mean_tokens": mean(tokens), "mean_subject_tokens": mean(subjects), "mean_subject_start": mean(starts)}
    return {"source": source, "count": len(facts), **means}
