"""Tracing gives the numbers of the plain, restoration-by-restoration computation."""

import copy

import numpy as np
import pytest
import torch
from helpers.compare import KEY, TOLERANCE, assert_same, assert_table_close, restored_share
from helpers.models import FACTS, gpt2, tokenizer as make_tokenizer
from oracles import tracing as oracle

import causalcone as cc

KINDS = ("hidden", "mlp", "attn")
STATES = (("hidden", 1), ("mlp", 2), ("attn", 3))
SHORT = (FACTS[0], FACTS[3])
FEW = (*SHORT, FACTS[5])


def assert_exact(model, tokenizer, facts=FACTS, dtype=None, **options):
    """Trace and compare with the oracle; ``dtype`` is the tracer's, where it is not the model's."""
    options = {"states": STATES, "samples": 3, "sigma": 0.5, **options}
    table = cc.Tracer(model, tokenizer, dtype=dtype).trace(facts, **options)
    reference = copy.deepcopy(model).to(dtype or model.dtype).eval()
    rows = oracle.trace(reference, tokenizer, facts, **options)
    assert_same(table, rows, dtype or model.dtype)
    return rows


@pytest.mark.parametrize(("layers", "width", "heads"), [(1, 16, 1), (2, 32, 4), (3, 24, 3), (5, 48, 6)])
def test_shapes(layers, width, heads, tokenizer):
    """Subjects at the start, in the middle and at the end, of one and of many tokens, targets of one to three tokens,
    prompts of unequal length, all traced together."""
    assert_exact(gpt2(layers, width, heads), tokenizer)


@pytest.mark.parametrize("target", ["label", "argmax"])
def test_facts_of_one_shape(model, tokenizer, target):
    """Facts of equal lengths, which share a plan, among others that do not."""
    subjects = ("Ann Lee", "Bo Lee", "Rome Needle", "The Space")
    alike = [cc.Fact(subject, "{} plays the sport of", subject, "golf") for subject in subjects]
    cases = [oracle.encode(model, tokenizer, fact, target) for fact in alike]
    assert len({(len(case.prompt), case.start, case.end, len(case.target)) for case in cases}) == 1
    facts = [alike[0], FACTS[1], alike[1], alike[2], FACTS[4], alike[3]]
    rows = assert_exact(model, tokenizer, facts, target=target)
    assert len({row["p_corrupted"] for row in rows}) == len(facts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_windows(kind, tokenizer):
    """Windows of all sizes, up to larger than the model, in one call."""
    states = [(kind, window) for window in (1, 2, 3, 5, 10, 40)]
    fact = cc.Fact("middle", "In {} they speak", "Ann Rome", "Latin")
    rows = assert_exact(gpt2(11, 16, 2), tokenizer, [fact], states=states, samples=2, tokens=(1, 3, 4, 5))
    assert restored_share(rows) > 0.5


def test_the_comparisons_see_something(model, tokenizer):
    """What the oracle gives differs from state to state, so that agreeing with it means something."""
    rows = oracle.trace(model, tokenizer, FACTS, STATES, samples=3, sigma=0.5, tokens="subject_onward")
    for kind in KINDS:
        assert restored_share([row for row in rows if row["kind"] == kind]) > 0.5
    distinct = {round(row["p_patched"] / row["p_corrupted"], 6) for row in rows}
    assert len(distinct) > len(rows) / 2


@pytest.mark.parametrize("target", ["label", "argmax"])
@pytest.mark.parametrize("sigma", [0, 0.094, "3sd", "1.5sd"])
def test_targets_and_noise_levels(model, tokenizer, target, sigma):
    assert_exact(model, tokenizer, SHORT, target=target, sigma=sigma)


def test_default_arguments(model, tokenizer):
    table = cc.Tracer(model, tokenizer).trace(SHORT)
    assert_same(table, oracle.trace(model, tokenizer, SHORT))


@pytest.mark.parametrize("samples", [1, 2, 10])
def test_numbers_of_samples(model, tokenizer, samples):
    rows = assert_exact(model, tokenizer, SHORT, samples=samples)
    assert all((row["p_patched_sd"] is None) == (samples == 1) for row in rows)


@pytest.mark.parametrize("tokens", ["all", "subject_onward", "subject", "subject_last", "last", (2, 5), [3]])
def test_selections_of_tokens(model, tokenizer, tokens):
    facts = [fact for fact in FACTS if fact.id != "only"]  # three tokens are too few for the indices
    rows = assert_exact(model, tokenizer, facts, tokens=tokens, states=STATES[1:2], samples=2)
    assert {row["fact_id"] for row in rows} == {fact.id for fact in facts}


def test_negative_indices_count_from_the_end(model, tokenizer):
    """Each prompt's own end, and a token named twice is one token."""
    options = {"states": STATES, "samples": 2, "sigma": 0.5}
    table = cc.Tracer(model, tokenizer).trace(FACTS, **options, tokens=(-1, -2, -1))
    whole = cc.Tracer(model, tokenizer).trace(FACTS, **options)
    last_two = [row for row in whole.to_pylist() if row["token"] >= row["prompt_tokens"] - 2]
    assert_same(table, last_two)


def test_tokens_before_the_subject_carry_the_corrupted_probability(model, tokenizer):
    table = cc.Tracer(model, tokenizer).trace(FACTS, states=STATES, samples=3, sigma=0.5)
    before = [row for row in table.to_pylist() if row["token"] < row["subject_start"]]
    assert len(before) > 100
    assert all(row["p_patched"] == row["p_corrupted"] for row in before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True},
        {"n_inner": 50},
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"activation_function": "silu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"tie_word_embeddings": False},
        {"layer_norm_epsilon": 1e-2},
        {"vocab_size": 401},
        {"attn_implementation": "eager"},
    ],
    ids=lambda config: "-".join(f"{name}={value}" for name, value in config.items()),
)
def test_gpt2_configurations(config, tokenizer):
    assert_exact(gpt2(3, **config), tokenizer, SHORT)


def test_an_activation_of_ones_own_in_one_layer(tokenizer):
    model = gpt2(3)
    model.transformer.h[1].mlp.act = torch.nn.Tanh()
    assert_exact(model, tokenizer)


def test_large_logits_cost_no_precision(tokenizer):
    """Logits far from zero, as those of GPT-2 are: their common part cancels in the probabilities."""
    model = gpt2(dtype=torch.float32)
    with torch.no_grad():
        model.transformer.ln_f.bias += 100 * model.lm_head.weight.mean(0) / model.lm_head.weight.mean(0).norm() ** 2
    exact = gpt2(dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    options = {"states": (("hidden", 1), ("mlp", 2)), "samples": 3, "sigma": 0.5}
    p, expected = (
        cc.Tracer(each, tokenizer).trace(FACTS, **options)["p_patched"].to_numpy() for each in (model, exact)
    )
    assert abs(p - expected).max() < 1e-5
    narrow = cc.Tracer(model, tokenizer, dtype="bfloat16").trace(FACTS, **options)["p_patched"].to_numpy()
    assert narrow.max() <= 1


def test_a_tokenizer_that_adds_special_tokens(model):
    rows = assert_exact(model, make_tokenizer(bos=True), FEW, sigma="3sd")
    assert {row["subject_start"] for row in rows if row["fact_id"] == "start"} == {1}


@pytest.mark.parametrize("target", ["label", "argmax"])
def test_float32(target, tokenizer):
    assert_exact(gpt2(dtype=torch.float32), tokenizer, target=target)


@pytest.mark.parametrize("target", ["label", "argmax"])
def test_a_float32_model_computed_in_float64(target, tokenizer):
    assert_exact(gpt2(dtype=torch.float32), tokenizer, FEW, dtype=torch.float64, target=target)


def test_a_bfloat16_model_computed_in_float32(tokenizer):
    assert_exact(gpt2(dtype=torch.bfloat16), tokenizer, FEW, dtype=torch.float32)


def test_dtypes_by_name(tokenizer):
    model = gpt2(1, dtype=torch.float32)
    options = {"states": STATES, "samples": 2}
    named = cc.Tracer(model, tokenizer, dtype="float64").trace(SHORT, **options)
    assert_table_close(named, cc.Tracer(model, tokenizer, dtype=torch.float64).trace(SHORT, **options))


def test_probabilities_are_finer_than_float32(tokenizer):
    """Probabilities near one keep their distance to it: they come from log-probabilities in float64."""
    model = gpt2(dtype=torch.float32)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(12)
        model.transformer.ln_f.bias.mul_(12)
    table = cc.Tracer(model, tokenizer).trace(FACTS, states=STATES, samples=3, sigma=0.1, target="argmax")
    p_clean = np.array(table["p_clean"].unique().to_pylist())
    assert (p_clean.astype(np.float32) != p_clean).all()
    assert len(np.unique(1 - p_clean)) == len(p_clean)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_bfloat16_stays_close(tokenizer, given):
    """A sanity check only: what is computed in bfloat16 is the same thing, coarsely."""
    options = {"states": STATES, "samples": 3, "sigma": 0.5, "target": "argmax"}
    model = gpt2(dtype=given)
    exact = oracle.trace(copy.deepcopy(model).float(), tokenizer, FEW, **options)
    rows = cc.Tracer(model, tokenizer, dtype=torch.bfloat16).trace(FEW, **options).to_pylist()
    values = {tuple(row[name] for name in KEY): row["p_patched"] for row in rows}
    differences = [abs(values[tuple(row[name] for name in KEY)] - row["p_patched"]) for row in exact]
    assert TOLERANCE[torch.float32][0] < max(differences) < 0.05
    assert np.median(differences) < 0.005


def test_a_model_in_training_mode_is_traced_without_dropout(tokenizer):
    model = gpt2(2).train()
    assert model.config.resid_pdrop > 0
    assert_exact(model, tokenizer, SHORT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_changed_weights_are_noticed(tokenizer, dtype):
    model = gpt2(2, dtype=dtype)
    tracer = cc.Tracer(model, tokenizer)
    options = {"states": STATES, "samples": 2, "sigma": 0.5}

    def assert_current():
        assert_same(tracer.trace(SHORT, **options), oracle.trace(model, tokenizer, SHORT, **options), dtype)

    assert_current()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.add_(0.1)
    assert_current()
    model.transformer.h[1].attn.c_proj.weight.data.mul_(1.5)
    assert_current()
    model.lm_head.weight.data.mul_(1.1)
    assert_current()
    model.load_state_dict(gpt2(2, seed=7).state_dict())
    assert_current()
    model.transformer.h[0].ln_1.bias = torch.nn.Parameter(model.transformer.h[0].ln_1.bias.detach() + 0.2)
    assert_current()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_on_a_gpu(dtype, tokenizer):
    assert_exact(gpt2(dtype=dtype).cuda(), tokenizer)
