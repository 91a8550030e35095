"""The oracle knows where each family keeps its values: what it reads adds up, and what it zeroes is gone."""

import copy

import pytest
import torch
from helpers.families import EVERY_FAMILY, FAMILIES
from helpers.models import FACTS, gpt2, tokenizer
from oracles import tracing as oracle
from oracles.editing import down
from oracles.gradients import integrated_gradients
from oracles.model import LAYOUTS, Site, hooked, precision, predict, sites

FACT = FACTS[4]  # its subject is in reach of the last token in sliding windows too


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def family(request):
    """A random float64 model of a family, of three layers and two heads. OPT's ReLU would make its gradients jump."""
    smooth = {"activation_function": "gelu"} if request.param == "opt" else {}
    return FAMILIES[request.param](layers=3, width=24, heads=2, **smooth)


def trace(model, **options):
    return oracle.trace(model, tokenizer(), [FACT], **{"samples": 2, "sigma": 0.5, "target": "argmax", **options})


def zero(model, **options):
    return oracle.zero(model, tokenizer(), [FACT], **{"target": "argmax", "tokens": "all", **options})


def test_a_block_adds_attention_and_mlp_to_what_enters_it(family):
    case = oracle.encode(family, tokenizer(), FACT, "label")
    for layer in sites(family):
        block = layer["hidden"].module
        seen = {}
        entering = block.register_forward_pre_hook(lambda module, args, seen=seen: seen.update(entering=args[0]))
        hooks = [(layer[kind], lambda v, kind=kind, seen=seen: seen.update({kind: v})) for kind in ("attn", "mlp")]
        hooks += [(layer["hidden"], lambda values, seen=seen: seen.update(hidden=values))]
        with torch.no_grad(), precision(family, lift=True):
            predict(family, case, [case.inputs] * 2, hooks)
        entering.remove()
        assert seen["attn"].norm() > 0.1
        assert seen["mlp"].norm() > 0.1
        share = getattr(family.config, "residual_multiplier", 1)
        torch.testing.assert_close(seen["entering"] + share * (seen["attn"] + seen["mlp"]), seen["hidden"])


def test_the_corrupted_run_is_the_model_on_noisy_embeddings(family):
    case = oracle.encode(family, tokenizer(), FACT, "argmax")
    p = []
    with torch.no_grad():
        for eps in oracle.draw(family, case, samples=2, seed=1):
            embeddings = family.get_input_embeddings()(torch.tensor([case.prompt]))
            embeddings[0, case.start : case.end] += 0.5 * eps
            p.append(float(family(inputs_embeds=embeddings).logits[0, -1].softmax(-1)[case.target[0]]))
    row = trace(family, states=[("mlp", 1)], tokens="last", lift=False)[0]
    assert abs(row["p_clean"] / row["p_corrupted"] - 1) > 1e-4
    assert row["p_corrupted"] == pytest.approx(sum(p) / 2, rel=1e-6)


def test_all_hidden_states_of_a_layer_restored_together_are_the_clean_run(family):
    for row in trace(family, states=[("hidden", 1)], joint=True):
        assert row["token"] is None
        assert row["p_patched"] == pytest.approx(row["p_clean"], rel=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "attn", "head.0", "head.1"])
def test_zeroing_is_a_model_with_zero_weights(family, kind):
    """In a window of two layers: the last layer and the one before it."""
    changed = copy.deepcopy(family)
    layout = LAYOUTS[family.config.model_type]
    for layer, block in list(enumerate(changed.get_submodule(layout.blocks)))[-2:]:
        erase(down(changed, layer) if kind == "mlp" else block.get_submodule(layout.projection), kind)
    (row,) = (row for row in zero(family, states=[(kind, 2)]) if row["layer"] == 2)
    case = oracle.encode(family, tokenizer(), FACT, "argmax")
    with torch.no_grad(), precision(family, lift=True):
        p = float(predict(changed, case, [case.inputs]))
    assert (row["method"], row["token"], row["p_corrupted"], row["p_patched_sd"]) == ("zero", None, None, None)
    assert abs(row["p_patched"] / row["p_clean"] - 1) > 1e-4
    assert row["p_patched"] == pytest.approx(p, rel=1e-12)


def erase(projection, kind):
    """Make a linear map that of zeros, or that of zeros for one of two heads."""
    weight = projection.weight.data if hasattr(projection, "in_features") else projection.weight.data.T
    if kind.startswith("head"):
        weight.unflatten(1, (2, -1))[:, int(kind[-1])] = 0
    else:
        weight.zero_()
        if projection.bias is not None:
            projection.bias.data.zero_()


def test_the_only_head_is_the_attention():
    model = gpt2(layers=3, heads=1)
    rows = {kind: trace(model, states=[(kind, 2)]) for kind in ("attn", "head.0")}
    for attn, head in zip(rows["attn"], rows["head.0"], strict=True):
        assert head["p_patched"] == pytest.approx(attn["p_patched"], rel=1e-12)


def test_all_heads_restored_together_are_the_attention(family):
    """Here the heads of one layer, at all tokens of the second of two rows, get the first row's values."""
    case = oracle.encode(family, tokenizer(), FACT, "argmax")
    layer = sites(family)[1]
    noise = (Site(family.get_input_embeddings()), lambda values: values[1].mul_(1.5))

    def restore(values):
        values[1] = values[0]

    with torch.no_grad(), precision(family, lift=True):
        inputs = [case.inputs] * 2
        heads = predict(family, case, inputs, [noise, (layer["head.0"], restore), (layer["head.1"], restore)])
        attn = predict(family, case, inputs, [noise, (layer["attn"], restore)])
        nothing = predict(family, case, inputs, [noise])
    assert abs(attn[1] / nothing[1] - 1) > 1e-4
    torch.testing.assert_close(heads, attn, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sever", ["mlp", "attn", "both"])
def test_severing_shows_before_the_last_layer(family, sever):
    options = {"states": [("hidden", 1)], "tokens": "subject_last"}
    severed, plain = ([row["p_patched"] for row in trace(family, **options, sever=each)] for each in (sever, None))
    assert severed[-1] == pytest.approx(plain[-1], rel=1e-12)
    assert abs(severed[0] / plain[0] - 1) > 1e-6


def test_gradients_sum_to_the_difference_in_probability(family):
    options = {"kinds": ("hidden", "mlp", "attn", "head.1"), "baseline": "corrupted", "sigma": 0.5, "samples": 1}
    case = oracle.encode(family, tokenizer(), FACT, "argmax")
    for row in integrated_gradients(family, tokenizer(), [FACT], **options, tokens=[case.end - 1]):
        assert abs(row["gap"]) <= 1e-5 * row["norm"]
        assert row["norm"] > 0 or row["layer"] == 2


def test_lifting_changes_the_last_digits_only(family):
    options = {"states": [("mlp", 1)], "tokens": "subject_last", "target": "label"}
    lifted, unmodified = ([row["p_patched"] for row in trace(family, **options, lift=lift)] for lift in (True, False))
    assert lifted == pytest.approx(unmodified, rel=1e-4)
    assert (lifted == unmodified) == (family.config.model_type in ("gpt2", "opt"))


def test_no_hook_is_left_behind(family):
    case = oracle.encode(family, tokenizer(), FACT, "label")
    kinds = ("hidden", "attn", "mlp", "head.0", "head.1")
    everywhere = [(layer[kind], lambda values: None) for layer in sites(family) for kind in kinds]
    with hooked(everywhere, batch=1):
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in family.modules()) == len(everywhere)
    with torch.no_grad():
        predict(family, case, [case.inputs], everywhere)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in family.modules())
