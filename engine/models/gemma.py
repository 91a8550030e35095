"""Gemma: Llama with embeddings scaled inside their module, and norms whose weights are read as differences from one."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers.models.gemma import modeling_gemma

from causalcone.engine.models.llama import Llama, Rows, modules_of, wide
from causalcone.engine.models.plain import Reader
from causalcone.kernels.norms import RMSNorm


class Gemma(Llama):
    modules: ClassVar[dict[str, type]] = {
        **modules_of(modeling_gemma, "Gemma"),
        "model.embed_tokens": modeling_gemma.GemmaTextScaledWordEmbedding,
    }

    def norm(self, module: Any, read: Reader) -> Rows:
        return RMSNorm(1 + wide(module.weight, read), module.eps)
