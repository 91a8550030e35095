"""Short hashes that tell whether facts or a model are the same as before."""

import hashlib
import json
from collections.abc import Sequence

from causalcone.engine.edit.moments.identity import Identity
from causalcone.engine.facts import Fact
from causalcone.engine.models.base import Architecture


def facts_fingerprint(facts: Sequence[Fact]) -> str:
    """Changes with every word of the facts."""
    return _hash(json.dumps([fact.record for fact in facts], sort_keys=True))


def model_fingerprint(architecture: Architecture) -> str:
    """Changes with the weights of a model, but for those of the last down-projection: up to 4,096 values are taken of
    each parameter."""
    last = architecture.sizes.depth - 1
    weights = Identity.of(architecture, [last]).fingerprints[last]
    return _hash(repr(sorted(weights.items())))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
