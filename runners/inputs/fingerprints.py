"""A short hash that tells whether facts are the same as before."""

import hashlib
import json
from collections.abc import Sequence

from causalcone.engine.facts import Fact


def facts_fingerprint(facts: Sequence[Fact]) -> str:
    """Changes with every word of the facts."""
    text = json.dumps([fact.record for fact in facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
