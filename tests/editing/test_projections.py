"""Changes of gate and up projections: written, seen without being written, scored and decoded as in the written model;
in files, and refused where they do not fit."""

import json

import pytest
import torch
from helpers.edited_models import bits, logits, low_rank, normal, seen, sizes
from helpers.editing_cases import INJECTION, task
from helpers.families import EVERY_FAMILY, FAMILIES
from helpers.models import gpt2, tokenizer
from oracles.model import precision
from oracles.scores import read, scored_prompts
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import causalcone as cc
from causalcone.engine.edit.deltas.apply import applied, apply, export
from causalcone.engine.edit.deltas.delta import Delta, Dense, LowRank
from causalcone.engine.edit.methods.batching import layers_and_batching
from causalcone.engine.edit.methods.edits import edit_of
from causalcone.engine.edit.methods.registry import method_named
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs.decoding import continuations
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.errors import ExperimentError, ModelError
from causalcone.engine.models import read_architecture
from causalcone.engine.run.session import Session

UP = ("c_fc", "fc_in", "dense_h_to_4h", "up_proj", "fc1")


def inner(model, layer, name):
    """A projection's weight (out, in) as a view of the parameter, found without asking the engine."""
    names = ("gate_proj", "gate_up_proj") if name == "gate" else (*UP, "gate_up_proj")
    ((path, module),) = (
        each for each in model.named_modules() if f".{layer}." in each[0] and each[0].rpartition(".")[2] in names
    )
    weight = module.weight.detach()
    if path.endswith("gate_up_proj"):
        return weight.chunk(2)[name == "up"]
    return weight if isinstance(module, torch.nn.Linear) else weight.T


def turned(model, seed):
    """A low-rank change of gate or up."""
    hidden, width = sizes(model)
    return LowRank(normal(width, 2, seed=seed, size=0.2), normal(hidden, 2, seed=seed + 1, size=0.2))


def changes(model):
    """By layer: of what comes into the MLP, of all of it, and of the way out."""
    gated = read_architecture(model).gated
    dense = Dense(normal(*reversed(sizes(model)), seed=9))
    found = {(1, "up"): turned(model, 3), 1: low_rank(model), (2, "up"): dense, 0: low_rank(model, seed=5)}
    return found | ({(1, "gate"): turned(model, 7), (3, "gate"): turned(model, 8)} if gated else {(3, "up"): dense})


def assert_written(model, delta):
    """Every weight is what it was and its change."""
    before = {place: weight_at(model, place).clone() for place in delta.changes}
    with applied(model, delta):
        for place, change in delta.changes.items():
            assert torch.allclose(weight_at(model, place), before[place] + change.rows(slice(None)), rtol=0, atol=1e-14)


def weight_at(model, place):
    return inner(model, *place) if isinstance(place, tuple) else seen(model, place)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_they_are_written_and_taken_out(family):
    model = FAMILIES[family](4)
    weights, before = bits(model), logits(model)
    delta = Delta(changes(model))
    assert_written(model, delta)
    assert bits(model) == weights
    with applied(model, delta):
        assert (logits(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "phi3", "gemma2", "gpt_neox"])
def test_scores_and_texts_are_those_of_the_written_model(family):
    """All edits in one pass, among them such as join at one layer by one projection and by several, and at the last."""
    model = FAMILIES[family](4)
    every = changes(model)
    deltas = [Delta(every), *(Delta({place: change}) for place, change in every.items())]
    deltas.append(Delta({1: every[1], (1, "up"): every[1, "up"]}))
    windows = [Window.of((number % 4,), 4) for number in range(len(deltas))]
    edits = [
        edit_of(INJECTION, f"method {n}", window, steps=1, loss=0.0, delta=delta)
        for n, (delta, window) in enumerate(zip(deltas, windows, strict=True))
    ]
    table = cc.Editor(model, tokenizer()).score(edits)
    prompts = scored_prompts(model, tokenizer(), INJECTION.fact)
    session = Session(model, tokenizer())
    text = Text(tuple(prompts[0][2].ids))
    written = continuations(session, [text] * len(deltas), [5] * len(deltas), deltas=deltas)
    for edit, tokens in zip(edits, written, strict=True):
        found = [row["p_post"] for row in table.to_pylist() if row["edit_id"] == edit.edit_id]
        with applied(model, edit.delta), precision(model, lift=True):
            expected = [read(model, task(INJECTION), prompt, INJECTION.target).p for _, _, prompt in prompts]
            assert tokens == continuations(session, [text], [5])[0]
        assert found == pytest.approx(expected, rel=1e-9)
        assert abs(found[0] / table["p_pre"][0].as_py() - 1) > 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_running_change_is_the_written_one(dtype):
    """Bit for bit, biases included."""
    model = gpt2(2, dtype=dtype)
    delta = Delta({(1, "up"): Dense(normal(*reversed(sizes(model))), normal(sizes(model)[1])), 0: low_rank(model)})
    layers = layers_and_batching(Session(model, tokenizer()))[0]
    running = [layers.changed_by(delta).block(layer) for layer in (0, 1)]
    with applied(model, delta):
        layers.forget()
        for layer, name in ((1, "up"), (0, "down"), (0, "up")):
            one, other = running[layer].projection(name), layers.block(layer).projection(name)
            assert torch.equal(one.weight, other.weight)
            assert torch.equal(one.bias, other.bias)
            assert one.activation is other.activation


def test_sums_and_norms_go_by_weight():
    model = FAMILIES["llama"](4)
    first, second = Delta(changes(model)), Delta({(1, "gate"): turned(model, 7), (0, "gate"): turned(model, 1)})
    both = first + second
    assert both.layers == (0, 1, 2, 3)
    assert list(both.changes) == [0, (0, "gate"), 1, (1, "gate"), (1, "up"), (2, "up"), (3, "gate")]
    assert both.at(1).keys() == {"down", "gate", "up"}
    assert both.changes[1, "gate"].norm == pytest.approx(2 * turned(model, 7).norm)
    assert tuple(Delta({(2, "down"): low_rank(model)}).changes) == (2,)
    norms = [change.norm for change in both.changes.values()]
    assert both.norm == pytest.approx(sum(norm**2 for norm in norms) ** 0.5)


def test_the_relative_norm_is_of_the_weight_that_is_changed():
    model = FAMILIES["llama"](2)
    change = turned(model, 3)
    edit = edit_of(INJECTION, "finetune", Window.of((1,), 2), steps=1, loss=0.0, delta=Delta({(1, "gate"): change}))
    judged = cc.Editor(model, tokenizer())._model(method_named("finetune")).judged(edit)
    assert judged.relative_norm == pytest.approx(change.norm / inner(model, 1, "gate").norm().item())


def test_files_keep_them(tmp_path):
    model = FAMILIES["llama"](4)
    delta = Delta(changes(model))
    delta.save(tmp_path / "all.safetensors")
    loaded = Delta.load(tmp_path / "all.safetensors")
    assert list(loaded.changes) == list(delta.changes)
    for place, change in delta.changes.items():
        assert torch.equal(loaded.changes[place].rows(slice(None)), change.rows(slice(None)))
    Delta({3: low_rank(model)}).save(tmp_path / "down.safetensors")
    for name, version, tensors in (("all", 2, {"layers.1.gate.left", "layers.1.left"}), ("down", 1, {"layers.3.left"})):
        with safe_open(tmp_path / f"{name}.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["causalcone.delta"])["version"] == version
            assert tensors <= set(file.keys())


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_an_exported_model_has_them(family, tmp_path):
    model = FAMILIES[family](4)
    delta = Delta(changes(model))
    export(model, delta, tmp_path / "edited")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype=torch.float64)
    with applied(model, delta):
        assert bits(loaded) == bits(model)


def test_what_does_not_fit_is_refused():
    model, llama = gpt2(3), FAMILIES["llama"](3)
    up, before = turned(model, 0), bits(model)
    for place in ((1, "attn"), (True, "up"), (-1, "gate"), (1, 2), (1, "up", 0)):
        with pytest.raises(ExperimentError, match=r"layers are numbers from 0, .* or pairs such as \(3, 'gate'\)"):
            Delta({place: up})
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no gate-projection"):
        apply(model, Delta({(1, "gate"): up}))
    with pytest.raises(ExperimentError, match=r"layer 1 is for a weight of \(32, 128\), but .*\.1\.mlp\.c_fc"):
        apply(model, Delta({(1, "up"): low_rank(model)}))
    with pytest.raises(ExperimentError, match=r"bias of layer 1, but model\.layers\.1\.mlp\.up_proj has none"):
        apply(llama, Delta({(1, "up"): Dense(normal(*reversed(sizes(llama))), normal(sizes(llama)[1]))}))
    edits = [
        edit_of(INJECTION, "finetune", Window.of((1,), 3), steps=1, loss=0.0, delta=Delta({place: change}))
        for place, change in (((1, "gate"), up), ((1, "up"), low_rank(model)))
    ]
    editor = cc.Editor(model, tokenizer())
    with pytest.raises(ModelError, match="no gate-projection"):
        editor.score(edits[:1])
    with pytest.raises(ExperimentError, match=r"weight of \(32, 128\) in layer 1, the model's are \(128, 32\)"):
        editor.score(edits[1:])
    with pytest.raises(ExperimentError, match="does not fit the model"):
        continuations(editor.session, [Text((5,))], [2], deltas=[edits[1].delta])
    assert bits(model) == before


def test_gate_and_up_of_one_module_come_off_in_turn():
    model = FAMILIES["phi3"](2)
    before = bits(model)
    first, second = (apply(model, Delta({(1, name): turned(model, 0)})) for name in ("gate", "up"))
    with pytest.raises(ExperimentError, match="revert that one first"):
        first.revert()
    second.revert()
    first.revert()
    assert bits(model) == before
