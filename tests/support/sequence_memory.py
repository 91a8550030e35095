"""Edits facts of the demo world in sequence, in a fresh process, and prints how far its memory grew beyond the running
change and the history, in bytes: ``EDITS``."""

import sys

import psutil
import torch
from memory_growth import Peak
from transformers import GPT2Config, GPT2LMHeadModel

import causalcone as cc
from causalcone.runners.demo.model import train_tokenizer
from causalcone.runners.demo.world import World

BATCH = 10


def main(count: int) -> None:
    torch.set_num_threads(1)
    world = World.generate(400)
    tokenizer = train_tokenizer(world)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 256, "n_layer": 4, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    moments = cc.Moments.collect(model, tokenizer, [fact.text for fact in world.facts])
    editor = cc.Editor(model, tokenizer, moments, contexts=cc.Contexts(rome=["In the city"], memit=["In the city"]))
    requests = editor.requests(world.facts[:count], "error_injection", filtered=False)
    hparams = cc.MemitHparams(steps=3)
    next(editor.sequence(requests, "memit-seq", [(1, 2)], hparams=hparams, batch=BATCH))  # what the first needs
    sequence = editor.sequence(requests, "memit-seq", [(1, 2)], hparams=hparams, batch=BATCH)
    before = psutil.Process().memory_info().rss
    with Peak() as peak:
        for batch in sequence:
            del batch
    tensors, _ = sequence.delta.parts()
    held = sequence.history.bytes + sum(tensor.nbytes for tensor in tensors.values())
    print(sequence.edits, peak.bytes - before, held)


if __name__ == "__main__":
    main(int(sys.argv[1]))
