"""Every localization method gives the numbers of the plain computation, on every architecture."""

from types import SimpleNamespace

import pytest
import torch
from helpers.compare import assert_same, assert_same_gradients, assert_table_close, restored_share
from helpers.families import EVERY_FAMILY, FAMILIES
from helpers.models import FACTS, gpt2
from oracles import gradients as oracle_gradients, tracing as oracle

import causalcone as cc
from causalcone.engine.errors import FactError
from causalcone.engine.localize.causal_tracing import with_counterfactual_subjects

STATES = (("hidden", 1), ("mlp", 2), ("attn", 3))
HIDDEN = (("hidden", 1), ("hidden", 2))
HEADS = (("head.0", 1), ("head.1", 2), ("head.1", 5))
FEW = (FACTS[0], FACTS[1], FACTS[3])
COUNTERFACTUAL = (
    cc.Fact("same prefix", "{} plays the sport of", "Ann Lee", "tennis", counterfactual_subject="Bo Lee"),
    cc.Fact("behind a prefix", "In the city of {} they speak", "Ann Lee", "Latin", counterfactual_subject="Bo Lee"),
)
METHODS = {
    "plain": (STATES, {}),
    "sever mlp": (HIDDEN, {"sever": "mlp"}),
    "sever attn": (HIDDEN, {"sever": "attn"}),
    "sever both": (HIDDEN, {"sever": "both"}),
    "sever published": (HIDDEN, {"sever": "mlp", "compat": "published"}),
    "heads": (HEADS, {}),
    "joint": (STATES, {"joint": True, "tokens": "subject"}),
    "severed joint": (HIDDEN, {"joint": True, "tokens": "subject_onward", "sever": "attn"}),
    "uniform": (STATES, {"noise": cc.Noise("uniform")}),
    "replace": (STATES, {"noise": cc.Noise(replace=True)}),
    "replace published": (STATES, {"noise": cc.Noise(replace=True), "compat": "published"}),
    "extra tokens": (STATES, {"extra_tokens": 2}),
}


def assert_exact(model, tokenizer, facts, states, **options):
    options = {"samples": 2, "sigma": 0.5, **options}
    table = cc.Tracer(model, tokenizer).trace(facts, states, **options)
    rows = oracle.trace(model, tokenizer, facts, states, **options)
    assert_same(table, rows, model.dtype)
    return rows


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def family(request):
    return FAMILIES[request.param](3, 32, 4, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_methods_on_gpt2(model, tokenizer, method):
    states, options = METHODS[method]
    rows = assert_exact(model, tokenizer, FEW, states, **options)
    assert restored_share(rows) > 0.2


@pytest.mark.parametrize("method", ["plain", "sever both", "heads"])
def test_methods_on_every_architecture(family, tokenizer, method):
    states, options = METHODS[method]
    assert_exact(family, tokenizer, FEW[:2], states, **options)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_float32_on_every_architecture(name, tokenizer):
    model = FAMILIES[name](3, 32, 4, dtype=torch.float32)
    assert_exact(model, tokenizer, FEW[:2], STATES)
    assert_exact(model, tokenizer, FEW[:1], HIDDEN, sever="mlp")
    table = cc.Tracer(model, tokenizer).zero(FEW)
    assert_same(table, oracle.zero(model, tokenizer, FEW), torch.float32)


def test_the_unmodified_float64_model(family, tokenizer):
    """transformers takes norms, softmax and rotary angles in float32 even there."""
    options = {"states": STATES, "samples": 2, "sigma": 0.5}
    table = cc.Tracer(family, tokenizer).trace(FEW[:1], **options)
    expected = oracle.trace(family, tokenizer, FEW[:1], **options, lift=False)
    found = {tuple(row[name] for name in ("kind", "layer", "token")): row["p_patched"] for row in table.to_pylist()}
    assert max(abs(found[row["kind"], row["layer"], row["token"]] - row["p_patched"]) for row in expected) < 5e-6


@pytest.mark.parametrize("states", [(("mlp", 5),), (("mlp", 1), ("attn", 2), ("hidden", 1)), HEADS])
@pytest.mark.parametrize("tokens", ["subject", "all", (0, -1)])
def test_zeroing(model, tokenizer, states, tokens):
    options = {"states": states, "tokens": tokens}
    table = cc.Tracer(model, tokenizer).zero(FEW, **options)
    assert_same(table, oracle.zero(model, tokenizer, FEW, **options))


def test_zeroing_on_every_architecture(family, tokenizer):
    states = (("mlp", 2), ("head.1", 1))
    for target in ("label", "argmax"):
        table = cc.Tracer(family, tokenizer).zero(FEW[:2], states, target=target)
        assert_same(table, oracle.zero(family, tokenizer, FEW[:2], states, target=target))


@pytest.mark.parametrize("dof", [None, 5.0])
def test_noise_like_the_embeddings_of_a_text(model, tokenizer, dof):
    tracer = cc.Tracer(model, tokenizer)
    noise = tracer.embedding_noise([fact.text for fact in FACTS], dof=dof)
    options = {"states": STATES, "samples": 2, "noise": noise}
    assert_same(tracer.trace(FEW, **options), oracle.trace(model, tokenizer, FEW, **options))


@pytest.mark.parametrize("sever", [None, "mlp"])
def test_counterfactual_prompts(family, tokenizer, sever):
    facts = [
        fact
        for fact in COUNTERFACTUAL
        if len(tokenizer(fact.text)["input_ids"])
        == len(tokenizer(fact.prompt.replace("{}", fact.counterfactual_subject))["input_ids"])
    ]
    assert len(facts) == len(COUNTERFACTUAL)
    options = {"states": HIDDEN if sever else STATES, "noise": cc.Noise("counterfactual"), "sever": sever}
    rows = oracle.trace(family, tokenizer, facts, **options)
    assert_same(cc.Tracer(family, tokenizer).trace(facts, **options), rows)
    assert restored_share(rows) > 0.1


def test_integrated_gradients_on_every_architecture(family, tokenizer):
    table = cc.Tracer(family, tokenizer).integrated_gradients(FEW[:1], steps=4)
    assert_same_gradients(table, oracle_gradients.integrated_gradients(family, tokenizer, FEW[:1], steps=4))


@pytest.mark.parametrize("target", ["label", "argmax"])
@pytest.mark.parametrize("tokens", ["all", "subject_last"])
@pytest.mark.parametrize("baseline", ["zero", pytest.param("corrupted", marks=pytest.mark.slow)])
def test_integrated_gradients(model, tokenizer, baseline, tokens, target):
    options = {"steps": 5, "baseline": baseline, "tokens": tokens, "target": target, "samples": 2, "sigma": 0.3}
    table = cc.Tracer(model, tokenizer).integrated_gradients(FEW[1:], **options)
    assert_same_gradients(table, oracle_gradients.integrated_gradients(model, tokenizer, FEW[1:], **options))


def test_integrated_gradients_are_complete(model, tokenizer):
    """Their sum is what the state adds to the probability."""
    table = cc.Tracer(model, tokenizer).integrated_gradients(FEW, kinds=("mlp", "attn"))
    rows = table.to_pylist()
    scale = {row["fact_id"]: max(abs(r["total"]) for r in rows if r["fact_id"] == row["fact_id"]) for row in rows}
    assert max(abs(row["gap"]) / scale[row["fact_id"]] for row in rows) < 1e-5


def test_integrated_gradients_in_float32(tokenizer):
    exact, single = (gpt2(3, dtype=dtype) for dtype in (torch.float64, torch.float32))
    single.load_state_dict(exact.state_dict())
    rows = oracle_gradients.integrated_gradients(exact, tokenizer, FEW[:2], steps=5, kinds=("mlp", "attn"))
    table = cc.Tracer(single, tokenizer).integrated_gradients(FEW[:2], steps=5, kinds=("mlp", "attn"))
    assert_same_gradients(table, rows, torch.float32)


@pytest.mark.parametrize("method", ["plain", "sever published", "heads", "joint", "replace published"])
def test_splitting_changes_nothing(tokenizer, method):
    """Facts split by samples and by branches give the numbers of whole ones."""
    model = gpt2(3, dtype=torch.float64)
    states, options = METHODS[method]
    whole = cc.Tracer(model, tokenizer).trace(FEW, states, samples=4, sigma=0.5, **options)
    tracer = cc.Tracer(model, tokenizer, memory="1MiB")
    assert tracer.plan(FEW, states, samples=4, sigma=0.5, **options).passes > 1
    assert_same(tracer.trace(FEW, states, samples=4, sigma=0.5, **options), whole.to_pylist())


@pytest.mark.slow
def test_splitting_gradients_changes_nothing(tokenizer):
    model = gpt2(3, dtype=torch.float64)
    whole = cc.Tracer(model, tokenizer).integrated_gradients(FEW[:2], steps=5)
    parts = cc.Tracer(model, tokenizer, memory="2MiB").integrated_gradients(FEW[:2], steps=5)
    assert_same_gradients(parts, whole.to_pylist())


def test_gradients_of_states_that_nothing_depends_on(tokenizer):
    """The last layer's states before the last token."""
    table = cc.Tracer(gpt2(1), tokenizer).integrated_gradients(FEW[:1], kinds=("hidden",), tokens=(0,), steps=3)
    (row,) = table.to_pylist()
    assert (row["norm"], row["total"], row["gap"]) == (0, 0, 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_whatever_the_callers_mode(model, tokenizer, mode):
    tracer = cc.Tracer(model, tokenizer)
    expected = tracer.integrated_gradients(FEW[:1], kinds=("mlp",), steps=3)
    with mode():
        table = tracer.integrated_gradients(FEW[:1], kinds=("mlp",), steps=3)
    assert_table_close(table, expected)


def test_gradients_of_improbable_targets_in_float16(tokenizer):
    """p itself is too small a number for float16, its logarithm is not."""
    exact = gpt2(2, dtype=torch.float32)
    fact = cc.Fact("improbable", "In the city of {} they speak", "Rome", "Zqxjk Wyz qqq zzz")
    options = {"kinds": ("mlp",), "steps": 5, "target": "label", "tokens": "last"}
    right, rough = (
        cc.Tracer(exact, tokenizer, dtype=dtype).integrated_gradients([fact], **options)["norm"].to_numpy()
        for dtype in (torch.float32, torch.float16)
    )
    assert 0 < right.max() < 1e-7
    assert abs(rough / right - 1).max() < 0.2


def test_a_subject_whose_prompt_cannot_be_encoded_is_no_counterfactual():
    """Facts that cannot be used are refused, or left out, where they are encoded."""

    class Prompts:
        def prompt(self, text, **_):
            if "Bo" in text:
                raise FactError("not to be encoded")
            return SimpleNamespace(tokens=text.split())

    people = {"Ann Lee": "tennis", "Bo Lee": "golf", "Cy Lee": "chess"}
    facts = [cc.Fact(name, "{} plays", name, sport, relation_id="sport") for name, sport in people.items()]
    found = with_counterfactual_subjects(facts, Prompts())
    assert [fact.counterfactual_subject for fact in found] == ["Cy Lee", None, "Ann Lee"]
