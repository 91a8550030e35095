"""A delta changes exactly what it says, tells what rounding took of it, and is refused where it does not fit."""

import copy
import pickle
import re

import pytest
import torch
from helpers.compare import assert_table_close
from helpers.edited_models import bits, dense, down, logits, low_rank, normal, sizes
from helpers.families import EVERY_FAMILY, FAMILIES
from helpers.models import FACTS, gpt2

import causalcone as cc
from causalcone.engine.edit.deltas import apply as applying
from causalcone.engine.edit.deltas.apply import RoundedAway, applied, apply, export
from causalcone.engine.edit.deltas.delta import Delta, Dense, LowRank
from causalcone.engine.errors import ExperimentError, ModelError

pytestmark = pytest.mark.filterwarnings("error::causalcone.engine.edit.deltas.apply.RoundedAway")


@pytest.fixture
def own():
    """A float64 GPT-2 that a test may change."""
    return gpt2(3)


# --- what a delta does ---


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_an_applied_delta_adds_to_the_down_projections_output(family):
    model = FAMILIES[family](3)
    before, weights = logits(model), bits(model)
    few = low_rank(model)
    many = dense(model, seed=5, bias=down(model, 2).bias is not None)

    def add_few(module, inputs, output):
        return output + inputs[0] @ few.right @ few.left.T

    def add_many(module, inputs, output):
        return output + inputs[0] @ many.weight.T + (0 if many.bias is None else many.bias)

    hooks = [down(model, 0).register_forward_hook(add_few), down(model, 2).register_forward_hook(add_many)]
    wanted = logits(model)
    for hook in hooks:
        hook.remove()
    assert (wanted - before).abs().max() > 1e-3

    with applied(model, Delta({2: many, 0: few})) as edited:
        assert edited is model
        assert (logits(model) - wanted).abs().max() < 1e-5  # some families take norms in float32
        changed = {name for name, content in bits(model).items() if content != weights[name]}
        assert len(changed) == 2 + (many.bias is not None)
    assert bits(model) == weights
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("block", [1, 100, 2**20])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_low_rank_and_dense_changes_are_the_same(family, block, monkeypatch):
    monkeypatch.setattr(applying, "_BLOCK", block)
    model = FAMILIES[family](2)
    few = low_rank(model, rank=3)
    product = few.left @ few.right.T
    conv = family == "gpt2"
    wanted = down(model, 1).weight.detach() + (product.T if conv else product)
    for change in (few, Dense(product, None)):
        with applied(model, Delta({1: change})):
            torch.testing.assert_close(down(model, 1).weight.detach(), wanted, rtol=0, atol=1e-15)
    assert few.norm == pytest.approx(product.norm().item(), rel=1e-12)


def test_norms_count_all_layers_and_biases(own):
    few, many = low_rank(own), dense(own, dtype=torch.float32)
    flat = [(few.left @ few.right.T).flatten(), many.weight.double().flatten(), many.bias.double()]
    assert Delta({0: few, 2: many}).norm == pytest.approx(torch.cat(flat).norm().item(), rel=1e-12)
    assert Delta({1: low_rank(own, rank=0)}).norm == Delta({}).norm == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_parts_that_cancel_have_no_norm(own, seed):
    """Up to rounding, whose square is as often below zero as above."""
    few = low_rank(own, seed=seed)
    turned = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    cancelling = LowRank(torch.cat([few.left, -few.left @ turned], 1), torch.cat([few.right, few.right @ turned], 1))
    assert isinstance(cancelling.norm, float)  # and no complex number
    assert Delta({0: cancelling}).norm == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sums_are_taken_wide_and_rounded_once(dtype):
    model = gpt2(2, dtype=dtype)
    change = dense(model, dtype=torch.float64, size=1.0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (p.detach().clone().to(wide) for p in (down(model, 1).weight, down(model, 1).bias))
    with applied(model, Delta({1: change})):
        assert torch.equal(down(model, 1).weight, (weight + change.weight.T.to(wide)).to(dtype))
        assert torch.equal(down(model, 1).bias, (bias + change.bias.to(wide)).to(dtype))


def test_a_tracer_sees_the_edited_model_while_it_is_edited(own, tokenizer):
    tracer = cc.Tracer(own, tokenizer)

    def trace():
        return tracer.trace(FACTS[:3], states=(("hidden", 1), ("mlp", 2)), samples=2, sigma=0.5)

    before = trace()
    with applied(own, Delta({1: low_rank(own, size=0.5)})):
        inside = trace()
        fresh = cc.Tracer(copy.deepcopy(own), tokenizer)
    after = trace()
    assert_table_close(after, before)
    assert not inside["p_patched"].equals(before["p_patched"])
    assert_table_close(inside, fresh.trace(FACTS[:3], states=(("hidden", 1), ("mlp", 2)), samples=2, sigma=0.5))


# --- what rounding takes ---


@pytest.mark.parametrize("door", ["apply", "applied", "export"])
def test_a_warning_tells_what_the_dtype_swallows(door, tmp_path):
    """Changes as small as constrained fine-tuning makes vanish in bfloat16, but not in float32."""
    model = gpt2(2, dtype=torch.bfloat16)
    change = Dense(1e-5 * torch.sign(normal(*sizes(model))), None)
    before = down(model, 1).weight.detach().double().T
    written = (before + change.weight).to(torch.bfloat16).double() - before
    lost = (change.weight - written).norm().item()

    def enter():
        if door == "apply":
            apply(model, Delta({1: change}))
        elif door == "export":
            export(model, Delta({1: change}), tmp_path / "edited")
        else:
            with applied(model, Delta({1: change})):
                pass

    with pytest.warns(RoundedAway, match=r"bfloat16 round away .* float32") as caught:
        enter()
    (warning,) = caught
    assert warning.filename == __file__
    assert warning.message.asked == pytest.approx(change.norm, rel=1e-4)
    assert warning.message.lost == pytest.approx(lost, rel=1e-4)
    assert lost > 0.9 * change.norm
    assert str(pickle.loads(pickle.dumps(warning.message))) == str(warning.message)
    apply(gpt2(2, dtype=torch.float32), Delta({1: change}))


def test_a_loss_of_more_than_a_percent_of_the_whole_delta_is_warned_of():
    """Weights of 1 in bfloat16 take a change of k/128, and swallow one of 1/1024, here in another layer."""
    model = gpt2(2, dtype=torch.bfloat16)
    taken, swallowed = torch.zeros(2, *sizes(model))
    with torch.no_grad():
        for layer in range(2):
            down(model, layer).weight.fill_(1.0)
    swallowed[3, 5] = 1 / 1024
    taken[7, 2] = 13 / 128
    apply(model, Delta({0: Dense(taken), 1: Dense(swallowed)})).revert()
    taken[7, 2] = 12 / 128
    with pytest.warns(RoundedAway, match="round away 1%"):
        apply(model, Delta({0: Dense(taken), 1: Dense(swallowed)})).revert()


def test_a_warning_made_an_error_leaves_the_weights(tmp_path):
    model = gpt2(2, dtype=torch.bfloat16)
    before, delta = bits(model), Delta({1: dense(model, size=1e-6)})
    with pytest.raises(RoundedAway):
        apply(model, delta)
    with pytest.raises(RoundedAway):
        export(model, delta, tmp_path / "edited")
    assert bits(model) == before
    assert not list(tmp_path.iterdir())


# --- what does not fit ---


def test_what_is_no_delta_is_refused(own):
    few = low_rank(own)
    for changes, match in (
        ({-1: few}, "layer -1"),
        ({True: few}, "layer True"),
        ({"3": few}, "layer '3'"),
        ({0: few.left}, "layer 0 is a Tensor"),
    ):
        with pytest.raises(ExperimentError, match=match):
            Delta(changes)
    with pytest.raises(ExperimentError, match=r"left \(32, 2\) and right \(128, 1\)"):
        LowRank(few.left, few.right[:, :1])
    with pytest.raises(ExperimentError, match=r"bias \(31,\)"):
        Dense(torch.zeros(32, 128), torch.zeros(31))
    with pytest.raises(ExperimentError, match="LowRank is not a delta"):
        apply(own, few)


def test_a_delta_of_another_model_is_refused(own):
    before = bits(own)
    for other in (gpt2(3, 16), FAMILIES["llama"](3)):
        shapes = re.escape(f"{sizes(other)}, but transformer.h.1.mlp.c_proj has (32, 128)")
        with pytest.raises(ExperimentError, match=f"layer 1 .* {shapes}"):
            apply(own, Delta({0: low_rank(own), 1: low_rank(other)}))
    with pytest.raises(ExperimentError, match="layer 3, but the model's layers are 0 to 2"):
        apply(own, Delta({0: low_rank(own), 3: low_rank(own)}))
    llama = FAMILIES["llama"](2)
    with pytest.raises(ExperimentError, match=r"bias of layer 1, but model\.layers\.1\.mlp\.down_proj has none"):
        apply(llama, Delta({1: dense(llama)}))
    assert bits(own) == before


def same_parameter(model):
    down(model, 2).weight = down(model, 1).weight


def same_block(model):
    model.transformer.h[2] = model.transformer.h[1]


def same_memory(model):
    down(model, 2).weight.data = down(model, 1).weight.data


@pytest.mark.parametrize("tie", [same_parameter, same_block, same_memory])
def test_a_weight_of_two_layers_is_refused(own, tie):
    tie(own)
    with pytest.raises(ModelError, match=r"h\.1\.mlp\.c_proj\.weight shares its memory with transformer\.h\.2\.mlp"):
        apply(own, Delta({1: low_rank(own)}))
    apply(own, Delta({0: low_rank(own)})).revert()


def test_parameters_side_by_side_in_one_buffer_are_not_tied(own):
    parameters = list(own.parameters())
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(parameters), parameters)
    before = bits(own)
    with applied(own, Delta({1: dense(own)})):
        edited = bits(own)
    changed = {name for name in before if before[name] != edited[name]}
    assert changed == {"transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.bias"}
    assert bits(own) == before


def test_a_model_that_cannot_be_read_is_refused(own):
    hook = own.transformer.h[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="hooks"):
        apply(own, Delta({0: low_rank(own)}))
    hook.remove()
    with applied(own, Delta({0: low_rank(own)})):  # a hook that comes later is in nobody's way
        own.transformer.h[0].register_forward_hook(lambda *_: None)
