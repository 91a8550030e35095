"""The model's own forward: its logits to compare with, and the refusal of models whose parameters, read directly, would
not give what it computes."""

import re
from typing import Any

import torch
from torch import Tensor

from causalcone.engine.errors import ModelError
from causalcone.kernels.transfer import fetch


@torch.no_grad()
def model_logits(model: Any, ids: Tensor) -> Tensor:
    """The model's logits (1, T, V) of token ids (1, T) without dropout, its training mode left as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        return model(ids, use_cache=False, output_hidden_states=False, output_attentions=False, return_dict=True).logits
    finally:
        for module in training:
            module.training = True


def refuse_unreadable(model: Any, modules: dict[str, type]) -> None:
    """Raise ``ModelError`` naming what is in the way: quantization, offloading, adapters, hooks, or custom code.
    ``modules`` are those of ``Architecture``."""
    refuse_changed(model, modules)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(
                f"the parameter {name} is offloaded (on the meta device); load the model onto a device, "
                "weights='resident' in from_pretrained"
            )


def refuse_changed(model: Any, modules: dict[str, type]) -> None:
    """The same, but for where the parameters are."""
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise ModelError("the model is quantized; load it with full-precision weights (no quantization_config)")
    _refuse_custom_code(model, modules)
    for name, module in model.named_modules():
        if _hooks(module):
            raise ModelError(f"{_named(name)} has forward hooks, which would be passed by; remove them first")
        if "forward" in vars(module):
            raise ModelError(f"{_named(name)} has a replaced forward, which would be passed by; load the model afresh")


def refuse_unfinite(model: Any) -> None:
    """Raise ``ModelError`` naming the first parameter in memory that holds NaN or infinity."""
    there = {name: parameter.detach() for name, parameter in model.named_parameters() if not parameter.is_meta}
    finite = {name: fetch(_finite(values)) for name, values in there.items()}  # all before the first is waited for
    for name, fetched in finite.items():
        if not fetched.wait()[0]:
            raise ModelError(f"the parameter {name} holds NaN or infinity; the weights are damaged, load them again")


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(_finite(values))


def _finite(values: Tensor) -> Tensor:
    if not values.numel():
        return torch.ones((), dtype=torch.bool)
    return torch.isfinite(torch.stack(torch.aminmax(values))).all()


def _hooks(module: torch.nn.Module) -> bool:
    """Whether anything but transformers' own recorder of outputs is hooked onto the module."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return hasattr(module, "_hf_hook") or any(
        getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks
    )


def _refuse_custom_code(model: Any, modules: dict[str, type]) -> None:
    present = set()
    patterns = {name: re.compile(re.escape(name.rstrip("?")).replace(r"\*", r"\d+") + r"\Z") for name in modules}
    for name, module in model.named_modules():
        for expected, pattern in patterns.items():
            if pattern.match(name):
                present.add(expected)
                if type(module) is not modules[expected]:
                    raise ModelError(
                        f"{_named(name)} is a {type(module).__name__} where {modules[expected].__name__} is expected; "
                        "wrapped models (LoRA, quantization) and custom code are not supported: load the plain, merged "
                        "model"
                    )
    for expected, kind in modules.items():
        if expected not in present and not expected.endswith("?"):
            raise ModelError(f"the model has no {kind.__name__} where one is expected ({expected})")


def _named(name: str) -> str:
    return f"the module {name}" if name else "the model"
