"""Records of published fact files, as these have them."""

from __future__ import annotations

from typing import Any

COUNTERFACT: dict[str, Any] = {
    "case_id": 17,
    "pararel_idx": 3,
    "requested_rewrite": {
        "prompt": "{} was born in",
        "relation_id": "P19",
        "target_new": {"str": "Lima", "id": "Q2868"},
        "target_true": {"str": "Oslo", "id": "Q585"},
        "subject": "Åse Lund",
    },
    "paraphrase_prompts": ["It rained. Åse Lund comes from", "Åse Lund's home town is"],
    "neighborhood_prompts": ["Kari Moe was born in"],
    "attribute_prompts": ["Ana Paz was born in"],
    "generation_prompts": ["Åse Lund's childhood was"],
}
