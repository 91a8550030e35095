"""Architectures: one file each, found from the model's class and config."""

from __future__ import annotations

from typing import Any

from causalcone.engine.errors import ModelError
from causalcone.engine.models.base import Architecture
from causalcone.engine.models.gemma import Gemma
from causalcone.engine.models.gemma2 import Gemma2
from causalcone.engine.models.gemma3 import Gemma3
from causalcone.engine.models.gpt2 import GPT2
from causalcone.engine.models.gpt_neo import GPTNeo
from causalcone.engine.models.gpt_neox import GPTNeoX
from causalcone.engine.models.gptj import GPTJ
from causalcone.engine.models.granite import Granite
from causalcone.engine.models.llama import Cwm, Llama, Ministral, Mistral, Qwen2, Qwen3, SeedOss, SmolLM3
from causalcone.engine.models.olmo2 import Olmo2, Olmo3
from causalcone.engine.models.opt import OPT
from causalcone.engine.models.phi import Phi
from causalcone.engine.models.phi3 import Phi3
from causalcone.engine.models.refusal import refuse_unreadable
from causalcone.engine.models.starcoder2 import Starcoder2

ARCHITECTURES: dict[str, type[Architecture]] = {
    "cwm": Cwm,
    "gemma": Gemma,
    "gemma2": Gemma2,
    "gemma3_text": Gemma3,
    "gpt2": GPT2,
    "gpt_neo": GPTNeo,
    "gpt_neox": GPTNeoX,
    "gptj": GPTJ,
    "granite": Granite,
    "llama": Llama,
    "ministral": Ministral,
    "mistral": Mistral,
    "olmo2": Olmo2,
    "olmo3": Olmo3,
    "opt": OPT,
    "phi": Phi,
    "phi3": Phi3,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "seed_oss": SeedOss,
    "smollm3": SmolLM3,
    "starcoder2": Starcoder2,
}
"""Supported architectures by the ``model_type`` of their config."""


def read_architecture(model: Any) -> Architecture:
    """How to compute this transformers model, reading its parameters directly; refuses what that would get wrong."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        raise ModelError(f"{type(model).__name__} is not a transformers model; load one with AutoModelForCausalLM")
    check_supported(kind)
    architecture = ARCHITECTURES[kind]
    refuse_unreadable(model, architecture.modules)
    return architecture(model)


def check_supported(kind: str) -> None:
    """Raise ``ModelError`` naming an architecture that is not supported, and those that are."""
    if kind not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"the architecture {kind!r} is not supported; supported are: {supported}")
