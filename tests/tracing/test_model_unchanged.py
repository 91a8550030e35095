"""Neither the model nor anything global is changed by tracing it, however that ends."""

import copy
import random

import numpy as np
import pytest
import torch
from helpers.models import FACTS, gpt2

import causalcone as cc

OPTIONS = {"states": (("hidden", 1), ("mlp", 2)), "samples": 2, "sigma": "3sd"}


def model_state(model):
    """Everything about a model that tracing might touch, with parameters as raw bytes."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "weights": {name: _bytes(tensor) for name, tensor in model.state_dict().items()},
        "identity": {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()},
        "dtype": {name: (p.dtype, p.device, p.is_contiguous()) for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name: None if p.grad is None else _bytes(p.grad) for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {name: [len(getattr(module, kind)) for kind in hooks] for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "modules": {name: id(module) for name, module in modules.items()},
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
    }


def global_state():
    """Everything global that tracing might touch."""
    return {
        "torch": _bytes(torch.get_rng_state()),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "denormals": float(torch.tensor(1e-310, dtype=torch.float64) * 1.0),
        "numpy errors": np.geterr(),
    }


def _bytes(tensor):
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def used_model():
    """A model as its user may hold it: in part training, in part frozen, with gradients."""
    model = gpt2(3).train()
    model.transformer.h[1].eval()
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    return model


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_trace_changes_nothing(used_model, tokenizer, dtype):
    before = model_state(used_model), global_state()
    tracer = cc.Tracer(used_model, tokenizer, dtype=dtype)
    tracer.plan(FACTS, **OPTIONS)
    tracer.trace(FACTS, **OPTIONS)
    tracer.trace(FACTS[:2], **OPTIONS, target="argmax")
    assert (model_state(used_model), global_state()) == before


def test_a_failed_trace_changes_nothing(used_model, tokenizer, monkeypatch):
    tracer = cc.Tracer(used_model, tokenizer)
    before = model_state(used_model), global_state()

    def failing(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(torch.nn.functional, "layer_norm", failing)
    with pytest.raises(ZeroDivisionError):
        tracer.trace(FACTS, **OPTIONS)
    with pytest.raises(cc.CausalconeError):
        tracer.trace(FACTS, **{**OPTIONS, "samples": 0})
    assert (model_state(used_model), global_state()) == before


def test_an_abandoned_stream_changes_nothing(used_model, tokenizer):
    before = model_state(used_model), global_state()
    tracer = cc.Tracer(
        used_model, tokenizer, memory=cc.Tracer(used_model, tokenizer).plan(FACTS, **OPTIONS).peak_bytes // 4
    )
    stream = tracer.stream(FACTS, **OPTIONS)
    next(stream)
    assert (model_state(used_model), global_state()) == before, "between two batches"
    stream.close()
    assert (model_state(used_model), global_state()) == before


def test_the_model_can_be_trained_afterwards(used_model, tokenizer):
    """No parameter became an inference tensor, and the autograd of its users works on."""
    cc.Tracer(used_model, tokenizer).trace(FACTS[:1], **OPTIONS)
    used_model.zero_grad()
    used_model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    torch.optim.SGD(used_model.parameters(), lr=0.1).step()
    assert used_model.transformer.wte.weight.grad.abs().sum() > 0


def test_facts_and_options_are_left_as_given(tokenizer):
    states, tokens, facts = [["hidden", 1], ["mlp", 2]], [2, 3], list(FACTS[:2])
    given = copy.deepcopy((states, tokens, facts))
    cc.Tracer(gpt2(2), tokenizer).trace(facts, states=states, tokens=tokens, samples=2)
    assert (states, tokens, facts) == given
