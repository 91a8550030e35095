"""The oracle's integrated gradients: completeness, and other ways to the same numbers."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.compare import assert_same_gradients
from helpers.models import FACTS, gpt2, tokenizer
from oracles import tracing as oracle
from oracles.gradients import integrated_gradients

LAYERS = 2
FACT = FACTS[3]


@pytest.fixture(scope="module")
def model():
    return gpt2(layers=LAYERS)


@pytest.fixture(scope="module")
def rows(model):
    return gradients(model, kinds=("mlp", "attn", "head.1"))


def gradients(model, **options):
    return integrated_gradients(model, tokenizer(), [FACT], **options)


def test_every_state_has_a_row(model, rows):
    length = len(oracle.encode(model, tokenizer(), FACT, "argmax").prompt)
    expected = [
        (kind, layer, t) for kind in ("mlp", "attn", "head.1") for layer in range(LAYERS) for t in range(length)
    ]
    assert [(row["kind"], row["layer"], row["token"]) for row in rows] == expected


def test_the_sum_is_the_difference_in_probability(rows):
    for row in rows:
        assert abs(row["gap"]) <= 1e-5 * abs(row["total"])
        assert row["norm"] > 0 or row["layer"] == LAYERS - 1


def test_from_zero_the_difference_is_that_of_zeroing(model, rows):
    for row in rows:
        options = {"states": [(row["kind"], 1)], "tokens": [row["token"]], "target": "argmax"}
        zeroed = oracle.zero(model, tokenizer(), [FACT], **options)[row["layer"]]
        difference = zeroed["p_clean"] - zeroed["p_patched"]
        assert row["total"] - row["gap"] == pytest.approx(difference, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("kind", ["hidden", "mlp", "attn"])
def test_from_the_corrupted_value(model, kind):
    """Completeness also where the baseline is the corrupted run's value, and nothing before the subject differs."""
    options = {"baseline": "corrupted", "sigma": 0.5, "samples": 3, "kinds": (kind,)}
    fact = FACTS[1]
    case = oracle.encode(model, tokenizer(), fact, "argmax")
    for row in integrated_gradients(model, tokenizer(), [fact], **options, tokens=(0, case.start, case.end, -1)):
        assert abs(row["gap"]) <= 1e-5 * row["norm"]
        in_reach = row["token"] == len(case.prompt) - 1 or row["layer"] < LAYERS - 1
        assert (row["norm"] > 0) == (row["token"] >= case.start and in_reach)


def test_the_last_state_against_its_own_derivatives(model):
    """After the last block there is only the final norm and the logits: here by automatic Jacobians and a fine sum."""
    case = oracle.encode(model, tokenizer(), FACT, "argmax")
    seen = []
    hook = model.transformer.h[-1].register_forward_hook(lambda module, args, output: seen.append(output[0, -1]))
    options = {"kinds": ("hidden",), "baseline": "corrupted", "sigma": 0.5, "samples": 2, "tokens": "last"}
    with torch.no_grad():
        embeddings = model.transformer.wte(torch.tensor([case.prompt] * 3))
        embeddings[1:, case.start : case.end] += 0.5 * oracle.draw(model, case, 2, seed=1)
        for each in embeddings:
            model(inputs_embeds=each[None])
    hook.remove()

    def p(state):
        return model.lm_head(model.transformer.ln_f(state)).softmax(-1)[case.target[0]]

    clean, *starts = seen
    vectors = []
    for start in starts:
        points = (torch.arange(400) + 0.5)[:, None] / 400 * (clean - start) + start
        vectors.append((clean - start) * torch.func.vmap(torch.func.grad(p))(points).mean(0))
    expected = torch.stack(vectors).mean(0).detach()
    row = gradients(model, **options)[-1]
    assert row["norm"] == pytest.approx(float(expected.norm()), rel=1e-4)
    assert row["total"] == pytest.approx(float(expected.sum()), rel=1e-4)


def test_labels_of_several_tokens(model):
    for row in gradients(model, kinds=("mlp",), target="label", tokens="subject_onward"):
        assert abs(row["gap"]) <= 1e-5 * row["norm"]


def test_the_comparison_of_tables(rows):
    table = pa.Table.from_pylist(rows[::-1])
    assert_same_gradients(table, rows)
    for name in ("norm", "total", "gap"):
        changed = [{**row, name: row[name] + 1e-6 * (row is rows[3])} for row in rows]
        with pytest.raises(AssertionError):
            assert_same_gradients(table, changed)
    with pytest.raises(AssertionError):
        assert_same_gradients(table.slice(1), rows)
    assert np.isfinite([row["norm"] for row in rows]).all()
