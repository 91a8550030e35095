"""The oracle itself, against cases whose result is known without it."""

import numpy as np
import pytest
import torch
from helpers.models import FACTS, gpt2, tokenizer
from oracles import tracing as oracle

FACT = FACTS[1]
EVERY_LAYER = 100


@pytest.fixture(scope="module")
def model():
    return gpt2(layers=3)


def trace(model, **options):
    return oracle.trace(model, tokenizer(), [FACT], **{"samples": 3, "sigma": 0.5, **options})


@pytest.mark.parametrize("kind", ["hidden", "mlp", "attn"])
def test_without_noise_nothing_changes(model, kind):
    for row in trace(model, states=[(kind, 2)], sigma=0.0, tokens="subject_onward"):
        assert row["p_patched"] == pytest.approx(row["p_corrupted"], rel=1e-12)
        assert row["p_patched"] == pytest.approx(row["p_clean"], rel=1e-12)


@pytest.mark.parametrize("window", [1, 2, EVERY_LAYER])
def test_the_last_tokens_final_state_is_the_clean_prediction(model, window):
    last_layer = 2
    rows = trace(model, states=[("hidden", window)], tokens="last", target="argmax")
    (row,) = (row for row in rows if row["layer"] == last_layer)
    assert abs(row["p_corrupted"] - row["p_clean"]) > 1e-3
    assert row["p_patched"] == pytest.approx(row["p_clean"], rel=1e-12)


def test_tokens_before_the_subject_have_no_effect(model):
    rows = trace(model)
    before = [row for row in rows if row["token"] < row["subject_start"]]
    assert before
    for row in before:
        assert row["p_patched"] == pytest.approx(row["p_corrupted"], rel=1e-12)


def test_the_teacher_forced_probability_is_the_product_over_the_target(model):
    fact = FACTS[3]
    case = oracle.encode(model, tokenizer(), fact, "label")
    text = fact.text + " " + fact.target_true
    assert case.prompt + case.target == tokenizer()(text)["input_ids"]
    product = 1.0
    for i in range(len(case.target)):
        with torch.no_grad():
            logits = model(torch.tensor([case.prompt + case.target[:i]])).logits[0, -1]
        product *= float(logits.softmax(-1)[case.target[i]])
    p_clean = oracle.trace(model, tokenizer(), [fact], states=[("mlp", 1)], samples=1, tokens="last")[0]["p_clean"]
    assert len(case.target) == 2
    assert p_clean == pytest.approx(product, rel=1e-12)


def test_the_corrupted_run_is_the_model_on_noisy_embeddings(model):
    case = oracle.encode(model, tokenizer(), FACT, "argmax")
    noise = np.random.RandomState(1).randn(3, case.end - case.start, model.config.n_embd)
    probabilities = []
    for sample in noise:
        embeddings = model.transformer.wte(torch.tensor([case.prompt])).detach().clone()
        embeddings[0, case.start : case.end] += 0.5 * torch.from_numpy(sample)
        with torch.no_grad():
            probabilities.append(float(model(inputs_embeds=embeddings).logits[0, -1].softmax(-1)[case.target[0]]))
    row = trace(model, target="argmax", states=[("attn", 1)], tokens="last")[0]
    assert row["p_corrupted"] == pytest.approx(sum(probabilities) / 3, rel=1e-12)


def test_windows_follow_the_published_rule():
    def layers(window, layer):
        return list(oracle.Restoration("mlp", window, layer, 0).layers(depth=12))

    assert layers(1, 4) == [4]
    assert layers(2, 4) == [3, 4]
    assert layers(3, 4) == [3, 4, 5]
    assert layers(5, 4) == [2, 3, 4, 5, 6]
    assert layers(10, 6) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert layers(5, 0) == [0, 1, 2]
    assert layers(10, 11) == [6, 7, 8, 9, 10, 11]
    assert layers(100, 5) == list(range(12))


def test_the_oracle_leaves_no_hook_behind(model):
    trace(model, tokens="last")
    assert not any(module._forward_hooks for module in model.modules())
