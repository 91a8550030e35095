"""Short hashes that tell whether facts or a model are the same as before."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from causalcone.engine.edit.moments.identity import Identity
from causalcone.engine.facts import Fact
from causalcone.engine.models.base import Architecture

_EVER = 14
"""How many fields of a fact, the first, are told whatever they hold. Younger ones are where they are not their default,
so that a sweep that was begun without them goes on."""


def facts_fingerprint(facts: Sequence[Fact]) -> str:
    """Changes with every word of the facts."""
    return _hash(json.dumps(list(map(fact_record, facts)), sort_keys=True))


def fact_record(fact: Fact) -> dict[str, object]:
    """All that a fact says, without younger fields that say nothing."""
    silent = {field.name for field in dataclasses.fields(fact)[_EVER:] if getattr(fact, field.name) == field.default}
    return {name: value for name, value in dataclasses.asdict(fact).items() if name not in silent}


def model_fingerprint(architecture: Architecture) -> str:
    """Changes with the weights of a model, but for those of the last down-projection: up to 4,096 values are taken of
    each parameter."""
    last = architecture.sizes.depth - 1
    weights = Identity.of(architecture, [last]).fingerprints[last]
    return _hash(repr(sorted(weights.items())))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
