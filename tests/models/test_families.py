"""Families from outside: a registered one is traced and edited like those built in, and packages can bring theirs."""

import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from helpers.architecture_checks import assert_exact_at_sites
from helpers.compare import assert_same
from helpers.editing_cases import CONTEXTS, EXACT, INJECTION, assert_rome, editor, random_moments, task
from helpers.models import FACTS, randomised, tokenizer
from oracles import editing as oracle_editing, model as oracle_model, rome as oracle_rome, tracing as oracle
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import causalcone as cc
from causalcone.engine.errors import ModelError
from causalcone.engine.models import read_architecture, register, registry
from causalcone.engine.models.llama import Llama

STATES = {"states": (("hidden", 1), ("mlp", 2), ("attn", 3), ("head.0", 1)), "samples": 2, "sigma": 0.5}


class ToyConfig(LlamaConfig):
    model_type = "toy"


class ToyMLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.into, self.back, self.act = nn.Linear(width, inner), nn.Linear(inner, width), nn.Tanh()

    def forward(self, rows):
        return self.back(self.act(self.into(rows)))


class ToyForCausalLM(LlamaForCausalLM):
    """Llama with tanh between two products, and LayerNorms."""

    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.norm = nn.LayerNorm(config.hidden_size)
        for layer in self.model.layers:
            layer.input_layernorm = nn.LayerNorm(config.hidden_size)
            layer.post_attention_layernorm = nn.LayerNorm(config.hidden_size)
            layer.mlp = ToyMLP(config.hidden_size, config.intermediate_size)


class Toy(Llama, code=sys.modules[LlamaForCausalLM.__module__], family="Llama"):
    classes = {**Llama.classes, "": ToyForCausalLM, "model.layers.*.mlp": ToyMLP}  # noqa: RUF012
    norm_class = nn.LayerNorm
    mlp, activation = ("mlp.into", "mlp.back"), "mlp.act"


def toy(layers=3, width=24, heads=2):
    config = ToyConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=2 * width + 8,
        num_attention_heads=heads,
        num_key_value_heads=1,
        max_position_embeddings=64,
        vocab_size=len(tokenizer()),
    )
    return randomised(ToyForCausalLM(config), torch.float64, seed=0)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """After each test what is registered is as before; the oracles know the toy."""
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    monkeypatch.setitem(
        oracle_model.LAYOUTS, "toy", oracle_model.Layout("model.layers", "self_attn", "mlp", "self_attn.o_proj")
    )
    monkeypatch.setitem(oracle_editing.DOWN, "toy", "mlp.back")
    registry._load_entry_points.cache_clear()
    yield
    registry._load_entry_points.cache_clear()


@pytest.fixture
def registered():
    register("toy")(Toy)


@pytest.mark.usefixtures("registered")
def test_every_value_is_the_models_own():
    assert_exact_at_sites(toy())


@pytest.mark.usefixtures("registered")
def test_tracing():
    model = toy()
    table = cc.Tracer(model, tokenizer()).trace(FACTS[1:3], **STATES)
    assert_same(table, oracle.trace(model, tokenizer(), FACTS[1:3], **STATES))


@pytest.mark.usefixtures("registered")
def test_editing():
    model, hparams = toy(), cc.RomeHparams(steps=3, stop_loss=None)
    moments = random_moments(model)
    (edit,) = editor(model, moments, contexts=CONTEXTS[:2]).rome([INJECTION], [1], hparams)
    assert edit.delta_norm > 1e-3
    plain = oracle_rome.rome(model, tokenizer(), task(INJECTION), CONTEXTS[:2], 1, moments.matrix(1), hparams)
    assert_rome(edit, plain, EXACT)


def bring(monkeypatch, name, value):
    point = EntryPoint(name, value, registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == registry.GROUP else [])


def test_a_package_brings_a_family(monkeypatch):
    monkeypatch.setitem(sys.modules, "toy_package", sys.modules[Toy.__module__])
    bring(monkeypatch, "toy", "toy_package:Toy")
    assert type(read_architecture(toy())) is Toy


def test_built_in_families_do_not_wait_for_packages(monkeypatch):
    bring(monkeypatch, "toy", "no_such_package:Toy")
    assert registry.family_of("llama") is Llama


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "no_such_package:Toy",
            r"'toy' \(causalcone.families: no_such_package:Toy\) cannot be loaded: No module",
        ),
        ("os.path:join", r"'toy' \(causalcone.families: os.path:join\) is not an Architecture"),
    ],
)
def test_a_package_that_fails_is_named(monkeypatch, value, message):
    bring(monkeypatch, "toy", value)
    with pytest.raises(ModelError, match=message):
        read_architecture(toy())


def test_an_unknown_family_names_all(monkeypatch):
    monkeypatch.setitem(sys.modules, "toy_package", sys.modules[Toy.__module__])
    bring(monkeypatch, "other", "toy_package:Toy")
    with pytest.raises(ModelError, match=r"'toy' is not supported; supported are: .*llama, .*other"):
        read_architecture(toy())
