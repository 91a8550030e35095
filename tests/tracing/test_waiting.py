"""The host does not wait for the device inside a pass, and prepares a pass while the device computes the one before."""

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES
from helpers.models import FACTS
from torch.utils._python_dispatch import TorchDispatchMode

import causalcone as cc
from causalcone.engine.run import runner as job

STATES = (("hidden", 1), ("mlp", 3), ("attn", 2), ("heads", 1))
WAITING = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal", "is_nonzero"}
"""Operations whose results the host needs to go on: on a device it would wait for them."""


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_", "index_put") else ()
        masked = any(index is not None and index.dtype == torch.bool for index in indices)
        assert name not in WAITING, name
        assert not masked, "a mask as index"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def strict(monkeypatch):
    """Passes that may not wait; the number of those that ran."""
    run_pass, count = job.run_pass, []

    def checked(*arguments):
        count.append(1)
        with NoWaiting():
            return run_pass(*arguments)

    monkeypatch.setattr(job, "run_pass", checked)
    return count


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "llama", "gemma2"])
def test_no_operation_of_a_pass_is_waited_for(kind, tokenizer, strict):
    tracer = cc.Tracer(FAMILIES[kind](), tokenizer)
    tracer.trace(FACTS, STATES, samples=2, target="argmax")
    tracer.zero(FACTS, ("mlp:1",))
    read = [cc.Read("logits"), cc.Read("hidden", layers=1, tokens=0)]
    tracer.run([cc.Prompt(fact.text) for fact in FACTS[:2]], [cc.Intervention("mlp", 1, "last", "zero")], read=read)
    assert len(strict) >= 3


def test_what_would_be_waited_for_is_seen():
    with NoWaiting(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(2).sum().item()
    with NoWaiting(), pytest.raises(AssertionError, match="mask"):
        torch.ones(2)[torch.tensor([True, False])]


@pytest.fixture
def ahead(monkeypatch):
    """What a device does: a pass is begun before the one before is asked for its results. The order of things."""
    monkeypatch.setattr(job, "passes_ahead", lambda device: 1)
    began, order = job.PassRunner._begin, []

    def begin(self, parts, *rest):
        finish = began(self, parts, *rest)
        order.append(("begun", parts[0].part.fact))

        def finished():
            order.append(("asked", parts[0].part.fact))
            return finish()

        return finished

    monkeypatch.setattr(job.PassRunner, "_begin", begin)
    return order


@pytest.mark.slow
def test_a_pass_is_begun_before_the_one_before_is_waited_for(model, tokenizer, ahead, monkeypatch):
    expected = cc.Tracer(model, tokenizer).trace(FACTS[:3], samples=2)
    del ahead[:]
    monkeypatch.setattr("causalcone.engine.run.scheduler.MAX_ROWS_CPU", 1)
    found = cc.Tracer(model, tokenizer).trace(FACTS[:3], samples=2)
    assert found["fact_id"].equals(expected["fact_id"])
    np.testing.assert_allclose(found["p_patched"], expected["p_patched"], atol=1e-12)
    begun = [place for place, (what, _) in enumerate(ahead) if what == "begun"]
    asked = [place for place, (what, _) in enumerate(ahead) if what == "asked"]
    assert len(begun) == len(asked) > len(FACTS)
    assert all(second < first for first, second in zip(asked, begun[1:], strict=False))


def test_what_is_computed_is_handed_out_before_memory_runs_out_for_good(model, tokenizer, ahead, monkeypatch):
    tracer = cc.Tracer(model, tokenizer)
    expected = next(iter(tracer.stream(FACTS[:1], samples=1, sigma=0.1)))
    run_pass = job.run_pass

    def failing(architecture, groups, *rest):
        if groups[0].tokens.shape[1:] != (1, expected["prompt_tokens"][0].as_py()):
            raise torch.OutOfMemoryError("out of memory")
        return run_pass(architecture, groups, *rest)

    monkeypatch.setattr(job, "run_pass", failing)
    monkeypatch.setattr("causalcone.engine.run.scheduler.MAX_ROWS_CPU", 1)
    other = next(fact for fact in FACTS if len(tokenizer(fact.text).input_ids) != expected["prompt_tokens"][0].as_py())
    stream = tracer.stream([FACTS[0], other], samples=1, sigma=0.1)
    np.testing.assert_allclose(next(stream)["p_patched"], expected["p_patched"], atol=1e-12)
    with pytest.raises(cc.CausalconeError, match=other.id):
        next(stream)
