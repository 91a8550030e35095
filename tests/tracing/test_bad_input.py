"""What cannot be computed is refused before anything is, and the message names the culprit."""

import copy

import pytest
import torch
from helpers.compare import assert_table_close
from helpers.models import FACTS, ZERO_WIDTH_SPACE, gpt2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertLMHeadModel, BloomConfig, BloomForCausalLM, GPT2Model

import causalcone as cc
from causalcone.engine.errors import ExperimentError, FactError, ModelError

OPTIONS = {"states": (("hidden", 1), ("mlp", 2)), "samples": 2, "sigma": 0.5}
GOOD = FACTS[:2]

BAD_FACTS = {
    "too long": cc.Fact("too long", "{} " + "plays the sport of " * 20, "Ann Lee", "tennis"),
    "no token": cc.Fact("no token", "The sport of {} is", ZERO_WIDTH_SPACE, "tennis"),
    "target too long": cc.Fact("target too long", "{} is", "Bo", "golf " * 70),
}


@pytest.fixture(scope="module")
def tracer(model, tokenizer):
    tracer = cc.Tracer(model, tokenizer)
    tracer.trace(GOOD, **OPTIONS)
    return tracer


def refuse(model, tokenizer, match):
    with pytest.raises(ModelError, match=match):
        cc.Tracer(model, tokenizer).trace(GOOD, **OPTIONS)


# --- arguments ---


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"states": (("resid", 1),)}, "resid"),
        ({"states": (("mlp", 0),)}, "window"),
        ({"states": (("mlp", -3),)}, "window"),
        ({"states": (("mlp", 1.5),)}, "1.5"),
        ({"states": ()}, "states"),
        ({"states": "resid"}, "resid"),
        ({"states": (("mlp",),)}, "mlp"),
        ({"states": ("mlp:ten",)}, "mlp:ten"),
        ({"states": (("mlp", 2), ("mlp", 2))}, "mlp:2"),
        ({"samples": 0}, "samples"),
        ({"samples": -1}, "samples"),
        ({"samples": 2.5}, "samples"),
        ({"sigma": -0.1}, "sigma"),
        ({"sigma": "-3sd"}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"sigma": float("inf")}, "sigma"),
        ({"sigma": "three"}, "three"),
        ({"sigma": "sd"}, "sigma"),
        ({"sigma": None}, "sigma"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"target": "best"}, "best"),
        ({"tokens": "subjects"}, "subjects"),
        ({"tokens": ()}, "tokens"),
        ({"tokens": (1.5,)}, "1.5"),
        ({"on_error": "ignore"}, "ignore"),
    ],
    ids=repr,
)
def test_arguments(tracer, options, match):
    with pytest.raises(ExperimentError, match=match):
        tracer.trace(GOOD, **{**OPTIONS, **options})
    with pytest.raises(ExperimentError, match=match):
        tracer.plan(GOOD, **{**OPTIONS, **options})


@pytest.mark.parametrize("memory", ["lots", "", 0, -5, "4 apples"])
def test_memory(model, tokenizer, memory):
    with pytest.raises(ExperimentError, match="memory"):
        cc.Tracer(model, tokenizer, memory=memory)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_dtype(model, tokenizer, dtype):
    with pytest.raises(cc.CausalconeError, match="dtype"):
        cc.Tracer(model, tokenizer, dtype=dtype)


# --- facts ---


@pytest.mark.parametrize(
    ("prompt", "subject", "target"),
    [("no place", "Bo", "x"), ("{} and {}", "Bo", "x"), ("{}", " ", "x"), ("{}", "", "x"), ("{}", "Bo", " ")],
)
def test_facts_that_cannot_be_made(prompt, subject, target):
    with pytest.raises(FactError, match="'the id'"):
        cc.Fact("the id", prompt, subject, target)


@pytest.mark.parametrize("name", BAD_FACTS)
def test_facts_that_cannot_be_traced(tracer, name):
    with pytest.raises(FactError, match=f"'{name}'"):
        tracer.trace([*GOOD, BAD_FACTS[name]], **OPTIONS)


def test_the_longest_prompt_that_fits(tokenizer):
    """The last target token is only predicted: it needs no position."""
    fact = FACTS[3]  # three tokens, and two of the target
    cc.Tracer(gpt2(1, positions=4), tokenizer).trace([fact], **OPTIONS)
    with pytest.raises(FactError, match=f"'{fact.id}'"):
        cc.Tracer(gpt2(1, positions=3), tokenizer).trace([fact], **OPTIONS)


@pytest.mark.parametrize("tokens", [(0, 7), (100,), (-8,)])
def test_token_indices_outside_the_prompt(tracer, tokens):
    """The first fact has seven tokens, 0 to 6."""
    with pytest.raises(cc.CausalconeError, match=f"'{FACTS[0].id}'"):
        tracer.trace(FACTS[:1], **OPTIONS, tokens=tokens)


def test_ids_that_occur_twice(tracer):
    with pytest.raises(FactError, match=f"'{GOOD[0].id}'"):
        tracer.trace([*GOOD, GOOD[0]], **OPTIONS)


def test_no_facts(tracer):
    """A study of no facts is an empty table and no work: a filter may have left none."""
    table = tracer.trace([], **OPTIONS)
    assert table.num_rows == 0
    assert table.schema == tracer.trace(GOOD, **OPTIONS).schema
    plan = tracer.plan([], **OPTIONS)
    assert plan.flops == plan.passes == plan.rows == 0


def test_a_tokenizer_of_another_model(tokenizer):
    model = gpt2(1, vocab_size=100)
    with pytest.raises(cc.CausalconeError, match="vocabulary"):
        cc.Tracer(model, tokenizer).trace(GOOD, **OPTIONS)


def test_facts_are_checked_before_anything_is_computed(tracer):
    with FlopCounterMode(display=False) as counter:
        with pytest.raises(FactError):
            tracer.trace([*GOOD, BAD_FACTS["too long"]], **OPTIONS)
        with pytest.raises(FactError):
            next(iter(tracer.stream([*GOOD, BAD_FACTS["no token"]], **OPTIONS)))
    assert counter.get_total_flops() == 0


def test_bad_facts_can_be_skipped(tracer):
    """The run is that of the good facts alone, noise level included; a warning names those left out."""
    facts = [BAD_FACTS["too long"], GOOD[0], BAD_FACTS["no token"], GOOD[1], BAD_FACTS["target too long"]]
    options = {**OPTIONS, "sigma": "3sd", "on_error": "skip"}
    with pytest.warns(UserWarning, match="too long") as warned:
        table = tracer.trace(facts, **options)
    assert_table_close(table, tracer.trace(GOOD, **options))
    text = " ".join(str(warning.message) for warning in warned)
    assert all(f"'{name}'" in text for name in ("too long", "no token", "target too long"))


def test_skipping_does_not_hide_bad_arguments(tracer):
    with pytest.raises(ExperimentError):
        tracer.trace(GOOD, **{**OPTIONS, "samples": 0}, on_error="skip")


def test_nothing_left_after_skipping(tracer):
    with pytest.warns(UserWarning, match="'no token'"):
        assert tracer.trace([BAD_FACTS["no token"]], **OPTIONS, on_error="skip").num_rows == 0


# --- models ---


class Scaled(type(gpt2(1))):
    """A subclass that computes something else."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class LowRank(nn.Module):
    """A projection with a low-rank addition, as adapters put in its place."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.weight.shape[0], 2), nn.Linear(2, base.weight.shape[1])

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_hooked_models(tokenizer):
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        model = gpt2(2)
        getattr(model.transformer.h[1].mlp, register)(lambda *args: None)
        refuse(model, tokenizer, r"transformer\.h\.1\.mlp.*hook")


def test_models_hooked_later(tokenizer):
    model = gpt2(2)
    tracer = cc.Tracer(model, tokenizer)
    tracer.trace(GOOD, **OPTIONS)
    handle = model.transformer.h[0].register_forward_hook(lambda *args: None)
    with pytest.raises(ModelError, match=r"transformer\.h\.0.*hook"):
        tracer.trace(GOOD, **OPTIONS)
    handle.remove()
    tracer.trace(GOOD, **OPTIONS)


def test_models_without_their_weights(tokenizer):
    model = gpt2(2)
    model.transformer.h[1] = model.transformer.h[1].to("meta")
    refuse(model, tokenizer, r"transformer\.h\.1\..*meta")


def test_quantized_models(tokenizer):
    model = gpt2(1)
    model.is_quantized = True
    refuse(model, tokenizer, "quantized")


def test_adapters(tokenizer):
    model = gpt2(2).float()
    model.transformer.h[0].attn.c_attn = LowRank(model.transformer.h[0].attn.c_attn)
    refuse(model, tokenizer, r"transformer\.h\.0\.attn\.c_attn.*LowRank")


def test_parametrized_weights(tokenizer):
    model = gpt2(2)
    nn.utils.parametrize.register_parametrization(model.transformer.h[0].mlp.c_fc, "weight", nn.Tanh())
    refuse(model, tokenizer, r"transformer\.h\.0\.mlp\.c_fc")


def test_subclasses_that_compute_something_else(tokenizer):
    refuse(Scaled(gpt2(1).config).double().eval(), tokenizer, "Scaled")


def test_replaced_forwards(tokenizer):
    model = gpt2(2)
    mlp = model.transformer.h[0].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)
    refuse(model, tokenizer, r"transformer\.h\.0\.mlp")


def test_layers_that_the_engine_does_not_know(tokenizer):
    model = gpt2(2)
    model.transformer.drop = nn.Tanh()
    refuse(model, tokenizer, "differ")


def test_cross_attention(tokenizer):
    refuse(gpt2(1, add_cross_attention=True), tokenizer, "(?i)cross")


def test_models_without_a_language_head(tokenizer):
    refuse(GPT2Model(gpt2(1).config).eval(), tokenizer, "GPT2Model")


@pytest.mark.parametrize(
    ("model_class", "config", "name"),
    [
        (
            BloomForCausalLM,
            BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=400),
            "bloom",
        ),
        (
            BertLMHeadModel,
            BertConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=400
            ),
            "bert",
        ),
    ],
    ids=["bloom", "bert"],
)
def test_architectures_that_are_not_supported(model_class, config, name, tokenizer):
    """The message lists what is."""
    refuse(model_class(config).eval(), tokenizer, f"{name}.*gpt2")


def test_things_that_are_no_transformers_model(tokenizer):
    refuse(nn.Linear(2, 2), tokenizer, "Linear")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "transformer.h.1.mlp.c_proj.bias", "transformer.ln_f.weight"]
)
def test_damaged_weights(tokenizer, name, value):
    model = gpt2(2)
    with torch.no_grad():
        model.get_parameter(name).flatten()[3] = value
    refuse(model, tokenizer, name.replace(".", r"\."))


def test_a_refused_model_is_left_as_it_was(tokenizer):
    model = gpt2(2)
    model.transformer.drop = nn.Tanh()
    before = copy.deepcopy(model.state_dict())
    refuse(model, tokenizer, "differ")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
