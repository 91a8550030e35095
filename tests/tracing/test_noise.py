"""The corruption: its stream, its level, and what it depends on."""

import numpy as np
import pytest
import torch
from helpers.compare import assert_same
from helpers.models import FACTS, gpt2, tokenizer as make_tokenizer
from oracles import tracing as oracle

import causalcone as cc

STATES = (("mlp", 1),)


def corrupted(model, tokenizer, facts, **options):
    """p_corrupted of each fact."""
    options = {"states": STATES, "samples": 3, "sigma": 0.5, "target": "argmax", "tokens": "last", **options}
    table = cc.Tracer(model, tokenizer).trace(facts, **options)
    return dict(zip(table["fact_id"].to_pylist(), table["p_corrupted"].to_pylist(), strict=True))


def test_every_fact_gets_a_fresh_stream(model, tokenizer):
    """A fact's noise does not depend on which facts come before it."""
    together = corrupted(model, tokenizer, FACTS)
    for fact in FACTS:
        assert corrupted(model, tokenizer, [fact])[fact.id] == pytest.approx(together[fact.id], rel=1e-12)


def test_the_stream_is_numpys_legacy_one(tokenizer):
    """p_corrupted of a single sample, from the model run on noisy embeddings."""
    model = gpt2(2)
    fact = FACTS[1]
    case = oracle.encode(model, tokenizer, fact, "argmax")
    embeddings = model.transformer.wte(torch.tensor([case.prompt])).detach()
    noise = np.random.RandomState(5).randn(1, case.end - case.start, 32)
    embeddings[0, case.start : case.end] += torch.from_numpy(0.25 * noise[0])
    with torch.no_grad():
        expected = float(model(inputs_embeds=embeddings).logits[0, -1].softmax(-1)[case.target[0]])
    found = corrupted(model, tokenizer, [fact], samples=1, sigma=0.25, seed=5)[fact.id]
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2, 2**32 - 1])
def test_seeds(model, tokenizer, seed):
    options = {"states": STATES, "samples": 2, "sigma": 0.5, "seed": seed}
    table = cc.Tracer(model, tokenizer).trace(FACTS[:2], **options)
    assert_same(table, oracle.trace(model, tokenizer, FACTS[:2], **options))


def test_another_seed_is_another_draw(model, tokenizer):
    first, second = (corrupted(model, tokenizer, FACTS, seed=seed) for seed in (1, 2))
    for fact in FACTS:
        assert abs(first[fact.id] - second[fact.id]) > 1e-4


def test_the_random_states_of_the_process_do_not_matter(model, tokenizer):
    results = []
    for seed in (3, 4):
        np.random.seed(seed)
        torch.manual_seed(seed)
        results.append(corrupted(model, tokenizer, FACTS))
    assert results[0] == results[1]


def test_deviations_are_taken_over_all_facts_of_the_run(model, tokenizer):
    """ "<k>sd" counts every subject, repeats included, whatever is traced of them or in how many passes."""
    facts = [*FACTS[:3], cc.Fact("again", "They say {} is", FACTS[0].subject, "golf")]
    ids = [token for fact in facts for token in tokenizer(fact.subject)["input_ids"]]
    deviation = float(model.transformer.wte.weight.detach()[ids].std())
    expected = corrupted(model, tokenizer, facts, sigma=2.5 * deviation)
    assert corrupted(model, tokenizer, facts, sigma="2.5sd") == pytest.approx(expected, rel=1e-9)
    without_repeat = corrupted(model, tokenizer, facts[:3], sigma="2.5sd")
    assert all(abs(without_repeat[name] / expected[name] - 1) > 1e-6 for name in without_repeat)


def test_deviations_count_the_tokenizers_special_tokens(model):
    tokenizer = make_tokenizer(bos=True)
    (bos, *ids) = tokenizer(FACTS[0].subject)["input_ids"]
    assert bos == tokenizer.bos_token_id
    deviation = float(model.transformer.wte.weight.detach()[[bos, *ids]].std())
    expected = corrupted(model, tokenizer, FACTS[:1], sigma=3 * deviation)
    assert corrupted(model, tokenizer, FACTS[:1], sigma="3sd") == pytest.approx(expected, rel=1e-9)


def test_no_noise_changes_nothing(model, tokenizer):
    rows = cc.Tracer(model, tokenizer).trace(FACTS, states=(("hidden", 1), ("attn", 2)), samples=2, sigma=0).to_pylist()
    for row in rows:
        assert row["p_patched"] == pytest.approx(row["p_clean"], rel=1e-9)
        assert row["p_corrupted"] == pytest.approx(row["p_clean"], rel=1e-9)


def test_noise_is_rounded_to_the_models_dtype(tokenizer):
    """In float32 the sum of embedding and noise is rounded once, after adding in float64."""
    options = {"states": STATES, "samples": 3, "sigma": 50.0, "target": "argmax", "tokens": "last"}
    model = gpt2(2, dtype=torch.float32)
    table = cc.Tracer(model, tokenizer).trace(FACTS, **options)
    assert_same(table, oracle.trace(model, tokenizer, FACTS, **options), torch.float32)
