"""Traces facts of the demo world in a fresh process and prints how far its memory grew: ``METHOD FACTS BUDGET_MIB``."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pyarrow as pa
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import causalcone as cc
from causalcone.runners.demo.model import train_tokenizer
from causalcone.runners.demo.world import World


class Peak:
    """The largest resident set of this process while the block runs, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.bytes, self.running = 0, True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while self.running:
            self.bytes = max(self.bytes, process.memory_info().rss)
            time.sleep(0.003)


def batches(tracer: cc.Tracer, method: str, facts: list[cc.Fact]) -> Iterator[pa.RecordBatch]:
    if method == "gradients":
        return tracer.stream_integrated_gradients(facts)
    return tracer.stream(facts, states=("hidden:1", "mlp:3"), samples=3, sigma=0.1)


def main(method: str, count: int, budget_mib: int) -> None:
    torch.set_num_threads(1)  # beside other tests, two would wait for each other
    world = World.generate(400)
    tokenizer = train_tokenizer(world)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 64, "n_layer": 4, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    tracer = cc.Tracer(model, tokenizer, memory=budget_mib * 2**20)
    loaded = psutil.Process().memory_info().rss
    facts = 0
    with Peak() as peak:
        for batch in batches(tracer, method, world.facts[:count]):
            facts += batch.num_rows > 0
    print(facts, peak.bytes - loaded)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
