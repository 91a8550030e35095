"""Small random models, tokenizers trained in memory, and the facts that the tests trace."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from causalcone.engine.facts import Fact

BOS = "<|endoftext|>"
ZERO_WIDTH_SPACE = "\u200b"

FACTS = (
    Fact("start", "{} plays the sport of", "Ann Lee", "tennis"),
    Fact("middle", "The mother tongue of {} is known to be", "Danielle Darrieux", "French"),
    Fact("end", "One of the famous players is called {}", "Bo", "golf"),
    Fact("only", "{}", "The Space Needle", "in Seattle"),
    Fact("one token", "In the city of {} they speak", "Rome", "Latin"),
    Fact("many tokens", "They say that {} is", "Zqxjk Wyz", "sporty"),
)


@functools.cache
def tokenizer(bos: bool = False, vocabulary: int = 360) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer. With ``bos`` it begins every text with a special token; a vocabulary of 257 is one
    token per byte. Zero-width spaces leave no token."""
    bpe = Tokenizer(BPE())
    bpe.normalizer = normalizers.Replace(ZERO_WIDTH_SPACE, "")
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_sentences(), trainer)
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        template = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
        bpe.post_processor = processors.Sequence([bpe.post_processor, template])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=BOS)


def _sentences() -> list[str]:
    """What the vocabulary is learnt from: words of some facts become one token, those of others stay in pieces."""
    people = ("Ann Lee", "Bo", "Rome", "The Space Needle", "Danielle Darrieux")
    answers = ("tennis", "golf", "Latin", "French", "in Seattle")
    prompts = [fact.prompt for fact in FACTS]
    return [f"{p.replace('{}', who)} {what}" for p, who, what in itertools.product(prompts, people, answers)]


def gpt2(
    layers: int = 4,
    width: int = 32,
    heads: int = 4,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    positions: int = 64,
    **config: Any,
) -> GPT2LMHeadModel:
    """A GPT-2 whose every parameter is random, biases and norms included, so that none can be left out unnoticed."""
    shape = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": positions}
    vocabulary = {"vocab_size": len(tokenizer()), "bos_token_id": 0, "eos_token_id": 0}
    return randomised(GPT2LMHeadModel(GPT2Config(**{**shape, **vocabulary, **config})), dtype, seed)


def randomised(model: PreTrainedModel, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """The model in ``dtype`` and evaluation mode, with weights large enough that every restored state shows.

    Norm weights and biases vary about their first values, one and zero; embeddings give logits a few units wide, and
    every product keeps the size of its input.
    """
    generator = torch.Generator().manual_seed(seed)
    linears = {module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)}
    embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                parameter += 0.3 * noise
            elif parameter is model.get_output_embeddings().weight:
                parameter.copy_(2.0 * noise / parameter.shape[-1] ** 0.5)
            elif parameter in embeddings:
                parameter.copy_(0.3 * noise)
            else:
                inputs = parameter.shape[1] if parameter in linears else parameter.shape[0]
                parameter.copy_(1.5 * noise / inputs**0.5)
    return model.to(dtype).eval()
