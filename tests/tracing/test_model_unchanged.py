"""Neither the model nor anything global is changed by tracing it, however that ends."""

import copy

import pytest
import torch
from helpers.models import FACTS, gpt2
from helpers.unchanged import state

import causalcone as cc

OPTIONS = {"states": (("hidden", 1), ("mlp", 2)), "samples": 2, "sigma": "3sd"}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_trace_changes_nothing(used_model, tokenizer, dtype):
    before = state(used_model)
    tracer = cc.Tracer(used_model, tokenizer, dtype=dtype)
    tracer.plan(FACTS, **OPTIONS)
    tracer.trace(FACTS, **OPTIONS)
    tracer.trace(FACTS[:2], **OPTIONS, target="argmax")
    assert state(used_model) == before


def test_a_failed_trace_changes_nothing(used_model, tokenizer, monkeypatch):
    tracer = cc.Tracer(used_model, tokenizer)
    before = state(used_model)

    def failing(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(torch.nn.functional, "layer_norm", failing)
    with pytest.raises(ZeroDivisionError):
        tracer.trace(FACTS, **OPTIONS)
    with pytest.raises(cc.CausalconeError):
        tracer.trace(FACTS, **{**OPTIONS, "samples": 0})
    assert state(used_model) == before


def test_an_abandoned_stream_changes_nothing(used_model, tokenizer):
    before = state(used_model)
    tracer = cc.Tracer(
        used_model, tokenizer, memory=cc.Tracer(used_model, tokenizer).plan(FACTS, **OPTIONS).peak_bytes // 4
    )
    stream = tracer.stream(FACTS, **OPTIONS)
    next(stream)
    assert state(used_model) == before, "between two batches"
    stream.close()
    assert state(used_model) == before


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
