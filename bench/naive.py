"""Causal tracing the way published code does it, to be timed against.

For every state, layer and prompt token one forward pass of the clean and the J corrupted sequences, with hooks, all
layers, all tokens and all logits. The passes are the test suite's oracle, so what is timed is also known to be right.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import oracle

Key = tuple[str, oracle.Restoration]


@dataclass
class NaiveRun:
    """What a naive study took, or the part of it that fitted into the time given.

    p_patched: the measured restorations' values by (fact id, restoration), to be compared with the engine's.
    """

    restorations: int
    seconds: float = 0.0
    p_patched: dict[Key, float] = field(default_factory=dict)

    @property
    def projected_seconds(self) -> float:
        """What all restorations take, judged by those that were measured."""
        return self.seconds / len(self.p_patched) * self.restorations


def measure(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Any],
    states: Sequence[oracle.State],
    samples: int = 10,
    sigma: float | str = "3sd",
    seed: int = 1,
    target: str = "label",
    seconds: float | None = None,
) -> NaiveRun:
    """Trace the facts naively. With ``seconds``, stop then: restorations are taken in random order, so that those
    measured are a fair sample of long and short prompts, and at least one is measured."""
    width = oracle.noise_width(model, tokenizer, facts, sigma)
    work = []
    for fact in facts:
        case = oracle.encode(model, tokenizer, fact, target)
        noise = width * oracle.draw(model, case, samples, seed)
        work += [(case, noise, restoration) for restoration in oracle.restorations(model, case, states, "all")]
    if seconds is not None:
        random.Random(0).shuffle(work)

    oracle.probabilities(model, *work[0])  # warm up
    run = NaiveRun(restorations=len(work))
    began = time.perf_counter()
    for case, noise, restoration in work:
        _, *patched = oracle.probabilities(model, case, noise, restoration)
        run.p_patched[case.fact_id, restoration] = sum(patched) / len(patched)
        run.seconds = time.perf_counter() - began
        if seconds is not None and run.seconds > seconds:
            break
    return run
