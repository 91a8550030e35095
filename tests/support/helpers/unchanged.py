"""What tracing and editing must leave as it was: everything about a model, and everything global."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from helpers.models import gpt2

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def used_model() -> PreTrainedModel:
    """A model as its user may hold it: in part training, in part frozen, with gradients."""
    model = gpt2(3).train()
    model.transformer.h[1].eval()
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    model.transformer.h[2].mlp.c_proj.weight.requires_grad_(False)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    return model


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model and everything global that might be touched, with parameters as raw bytes."""
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    return {
        "weights": {name: raw(tensor) for name, tensor in model.state_dict().items()},
        "identity": {name: (id(p), p.data_ptr(), p._version) for name, p in parameters.items()},
        "dtype": {name: (p.dtype, p.device, p.is_contiguous()) for name, p in parameters.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "gradients": {name: None if p.grad is None else raw(p.grad) for name, p in parameters.items()},
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {name: [len(getattr(module, kind)) for kind in HOOKS] for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "modules": {name: id(module) for name, module in modules.items()},
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "global": global_state(),
    }


def global_state() -> dict[str, Any]:
    return {
        "torch": raw(torch.get_rng_state()),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "denormals": float(torch.tensor(1e-310, dtype=torch.float64) * 1.0),
        "numpy errors": np.geterr(),
    }


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
