"""Every way of localizing on a CUDA device: the CPU's numbers, no wait within a pass, and no more operations and
copies for facts of many shapes than for those of one."""

import pytest
import torch
from helpers.compare import assert_table_close
from helpers.families import FAMILIES
from helpers.models import FACTS

import causalcone as cc
from causalcone.engine.run import runner

STATES = (("hidden", 1), ("mlp", 3), ("attn", 2), ("heads", 1))
NOISED = {"samples": 2, "sigma": 0.3}


def patched(tracer):
    """Vectors of the host and of the device in place of states, and zeros; and what they do to states and logits."""
    prompts = [cc.Prompt(fact.text) for fact in FACTS[:3]]
    vector = torch.linspace(-1, 1, tracer.session.sizes.hidden)
    runs = [
        cc.Intervention("mlp", 1, "last", "zero"),
        cc.Intervention("hidden", 0, 0, vector),
        cc.Intervention("mlp", 0, 0, -vector.to(tracer.device)),
        cc.Intervention("attn", 2, "last", "zero"),
    ]
    read = [cc.Read("logits"), cc.Read("hidden", layers=1, tokens=0)]
    results = tracer.run(prompts, [[each] for each in runs], read=read)
    return [value for result in results for value in (torch.from_numpy(result.patched.p), *result.patched.values)]


METHODS = {
    "restoring": lambda tracer: tracer.trace(FACTS, STATES, **NOISED),
    "the likeliest token": lambda tracer: tracer.trace(FACTS, STATES, target="argmax", **NOISED),
    "joint": lambda tracer: tracer.trace(FACTS, (("hidden", 1),), tokens="subject", joint=True, **NOISED),
    "severed": lambda tracer: tracer.trace(FACTS, (("hidden", 1),), sever="mlp", **NOISED),
    "noise in place": lambda tracer: tracer.trace(FACTS, (("mlp", 2),), noise="uniform", **NOISED),
    "zeroing": lambda tracer: tracer.zero(FACTS, (("mlp", 3), ("heads", 1))),
    "gradients": lambda tracer: tracer.integrated_gradients(FACTS[:3], steps=3),
    "gradients from noise": lambda tracer: tracer.integrated_gradients(
        FACTS[:2], ("hidden",), steps=2, baseline="corrupted", **NOISED
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gpt2", "gptj", "llama", "gemma2"])
def test_the_numbers_of_a_cpu(kind, method, tokenizer, monkeypatch):
    model = FAMILIES[kind](dtype=torch.float32)
    expected = METHODS[method](cc.Tracer(model, tokenizer, device="cpu"))
    strictly(monkeypatch)
    assert_table_close(METHODS[method](cc.Tracer(model.cuda(), tokenizer)), expected, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gpt2", "gptj", "llama", "gemma2"])
def test_given_values_and_what_they_change(kind, tokenizer, monkeypatch):
    model = FAMILIES[kind](dtype=torch.float32)
    expected = patched(cc.Tracer(model, tokenizer, device="cpu"))
    strictly(monkeypatch)
    found = patched(cc.Tracer(model.cuda(), tokenizer))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def strictly(monkeypatch):
    """Passes without gradient may not wait for the device."""
    run_pass = runner.run_pass

    def strict(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run_pass(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(runner, "run_pass", strict)


def facts_of(shapes):
    """A fact for each number of words before and after the subject."""
    return [
        cc.Fact(f"{before} {after}", "so " * before + "{} plays" + " on" * after, "Ann Lee", "tennis")
        for before, after in shapes
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "most"), [("gpt2", 18), ("gptj", 22), ("llama", 22)])
def test_operations_do_not_grow_with_the_shapes_of_facts(kind, most, device, tokenizer, monkeypatch):
    """Counts of one pass: so many operations and 2 copies a layer, whatever the facts, and rows are never copied."""
    if device is None:
        pytest.skip("a real device counts nothing")
    run_pass, counted = runner.run_pass, []

    def counting(*arguments):
        device.reset()
        result = run_pass(*arguments)
        counted.append((len(arguments[1]), device.operations.copy(), sum(device.uploads.values())))
        return result

    monkeypatch.setattr(runner, "run_pass", counting)
    layers = 6
    model = FAMILIES[kind](layers, dtype=torch.float32).cuda()
    for shapes in ([(0, 0)], [(before, after) for before in range(4) for after in range(5)]):
        cc.Tracer(model, tokenizer).trace(facts_of(shapes), (("hidden", 1), ("mlp", 4), ("attn", 4)), **NOISED)
    (one, of_one, _), (many, operations, uploads) = counted
    assert (one, many) == (1, 20)
    assert operations.total() <= most * layers
    assert operations.total() <= of_one.total() + 4 * layers, "launches of attention"
    assert not [asked for asked in operations if asked[0] in ("copy_", "clone") and operations[asked] >= layers]
    assert uploads <= 2 * layers
