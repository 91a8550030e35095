"""What editing is measured on: the benchmarks' prompts with others to score them by, contexts, and second moments."""

from __future__ import annotations

import itertools
import random
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from workload import prompts, random_model

from causalcone import Fact
from causalcone.engine.edit.texts.contexts import Contexts

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from oracles.editing import down

NOWHERE = Path("no such folder")
"""Where there are no prompts, so that they are generated, in a vocabulary of any size."""

ROME_CONTEXTS = (
    *("The morning train was late", "She opened the old window", "We walked along the river"),
    *("Rain fell on the garden", "He wrote another long letter", "The market opens at noon"),
    *("Children played near the bridge", "My brother sold his boat", "They painted the kitchen green"),
    "Nobody answered the telephone today",
    "The teacher closed the book and looked at the class",
    "After the storm the farmers counted their sheep once more",
    "Her uncle keeps a small shop at the station square",
    "In winter the lake freezes and people cross it slowly",
    "A letter from the bank arrived on the first Monday",
    "The cook asked for more salt and a clean spoon",
    "Two doctors worked through the night at the small hospital",
    "When the music stopped the dancers sat on the floor",
    "His father built the house with stones from the hill",
    "Most visitors come in spring when the roads are dry",
)
"""Ten texts of five and ten of ten words, each one token of GPT-2."""

MEMIT_CONTEXTS = (
    "The road from the village follows the river for miles",
    "Therefore the council decided to close the bridge until spring",
    "Because the snow was deep the school stayed closed today",
    "I have never seen so many boats in one place",
    "You could hear the bells from the other side too",
)
"""Five texts of ten words, that begin as the published ones do."""

OPENINGS = (
    "The lamp was still on when everybody had left.",
    "There is a second copy in the drawer.",
    "It took three days to repair the road.",
    "Tickets are sold at the door.",
    "The report is longer than last year's.",
    "Few people remember how it began.",
    "The garden has not been watered since June.",
    "Breakfast is served from seven to ten.",
)
"""What paraphrases begin with: sentences that have nothing to do with the fact."""

FIRST_NAMES = (
    *("Alma", "Boris", "Clara", "Dorian", "Edith", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Lionel"),
    *("Mabel", "Norman", "Olga", "Percy", "Rosa", "Simon", "Thea", "Victor"),
)
LAST_NAMES = (
    *("Ashdown", "Birkett", "Calloway", "Dunmore", "Eastman", "Fairlie", "Garrick", "Holloway", "Ingram", "Jessop"),
    *("Kendrick", "Lovell", "Marlow", "Northcott", "Osborne", "Pemberton", "Quayle", "Redfern", "Stoddard", "Wexford"),
)


@dataclass(frozen=True)
class EditingWorkload:
    """Facts with a new target, two paraphrases and ten neighbours each; their tokenizer; where the prompts are from;
    the contexts in which they are edited."""

    facts: list[Fact]
    tokenizer: Any
    source: str
    contexts: Contexts


def editing_workload(folder: Path, count: int, vocabulary: int) -> EditingWorkload:
    """The first CounterFact prompts, or generated ones where the folder is not there, as ``workload.prompts`` gives
    them. Paraphrases are the prompt after two openings, neighbours are the prompt about other names."""
    facts, tokenizer, source = prompts(folder, count, vocabulary)
    say: Callable[[str], str] = str if folder.is_dir() else partial(in_generated_words, vocabulary=vocabulary)
    draw = random.Random(0)
    return EditingWorkload(
        [with_evaluation(fact, draw, say) for fact in facts],
        tokenizer,
        source,
        Contexts(tuple(map(say, ROME_CONTEXTS)), tuple(map(say, MEMIT_CONTEXTS))),
    )


def with_evaluation(fact: Fact, draw: random.Random, say: Callable[[str], str]) -> Fact:
    """The fact with what it is scored by, and a new target if it has none."""
    openings = draw.sample(OPENINGS, 2)
    names = draw.sample(list(itertools.product(FIRST_NAMES, LAST_NAMES)), 10)
    return replace(
        fact,
        target_new=fact.target_new or say(draw.choice(LAST_NAMES)),
        paraphrase_prompts=tuple(f"{say(opening)} {fact.text}" for opening in openings),
        neighborhood_prompts=tuple(fact.prompt.replace("{}", say(" ".join(name))) for name in names),
    )


def in_generated_words(text: str, vocabulary: int) -> str:
    """A text in words that the tokenizer of generated prompts knows, each word as always the same one of them."""
    return " ".join(f"w{zlib.crc32(word.encode()) % vocabulary}" for word in text.split())


def editable_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with frozen random weights, as ``random_model`` makes it but for the size of its matrices: as
    transformers draws them, MLPs put out so little that the decay of a vector, over their outputs' square, outweighs
    its target."""
    model = random_model(config, dtype, device)
    scale = 5 / 3 / (config.initializer_range * config.hidden_size**0.5)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(scale)
    return model


@torch.no_grad()
def second_moments(model: Any, layers: Sequence[int], texts: int = 32, length: int = 64) -> dict[int, Tensor]:
    """By layer: the second moment (inner, inner) of its keys over texts of random tokens, in float32 or better. So few
    tokens leave directions without any key, so a tenth of the mean square is added to its diagonal."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (texts, length), generator=generator).to(model.device)
    moments: dict[int, Tensor] = {}

    def add(layer: int, module: nn.Module, inputs: Any) -> None:
        keys = inputs[0].flatten(0, -2)
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        products = keys.T @ keys / ids.numel()
        moments[layer] = moments[layer] + products if layer in moments else products

    handles = [down(model, layer).register_forward_pre_hook(partial(add, layer)) for layer in layers]
    for few in ids.split(4):
        model.base_model(few, use_cache=False)
    for handle in handles:
        handle.remove()
    for moment in moments.values():
        moment.diagonal().add_(0.1 * moment.diagonal().mean())
    return moments
