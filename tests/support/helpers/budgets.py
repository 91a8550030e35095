"""How little memory a study can be given."""

from functools import lru_cache

import causalcone as cc
from causalcone.engine.errors import MemoryBudgetError


@lru_cache(maxsize=8)
def smallest_budget(model, tokenizer, facts, **options):
    """The least budget, to one part in a hundred, with which a study is not refused."""

    def enough(budget):
        try:
            cc.Tracer(model, tokenizer, memory=budget).plan(facts, **options)
        except MemoryBudgetError:
            return False
        return True

    low, high = 1, 2 * cc.Tracer(model, tokenizer).plan(facts, **options).peak_bytes
    assert enough(high)
    while high - low > high / 100:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
