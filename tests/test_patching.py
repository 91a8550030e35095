"""Interventions of one's own give what hooks on the model give, one run at a time."""

import functools

import numpy as np
import oracle
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from lifting import lifted
from models import FACTS, tokenizer
from oracle_model import hooked, sites

import causalcone as cc

LAYERS, WIDTH, HEADS = 3, 32, 4
TEXTS = (
    "The mother tongue of Bo is known to be",
    "In the city of Rome they speak",
    "Ann Lee plays the sport of",
    "They say that is",
)
READS = (
    cc.Read("logits"),
    cc.Read("hidden", (0, -1), tuple(range(LAYERS))),
    cc.Read("mlp", 1, 1),
    cc.Read("attn", 2, 2),
)


@functools.cache
def network(name="gpt2"):
    return FAMILIES[name](LAYERS, WIDTH, HEADS, dtype=torch.float64)


def ids_of(text):
    return tokenizer()(text)["input_ids"]


def kinds():
    return ("hidden", "attn", "mlp", *(f"head.{head}" for head in range(HEADS)))


@torch.no_grad()
def forward(model, ids, edits=()):
    """Logits (T, V), and the values of every site (T, width) by (layer, kind), with edits (layer, kind, token, value)
    made one after the other."""
    seen = {}
    hooks = []

    def editing(token, value):
        def edit(rows):
            rows[0, token] = value

        return edit

    def recording(layer, kind):
        def record(rows):
            seen[layer, kind] = rows[0].clone()

        return record

    blocks = sites(model)
    hooks += [(blocks[layer][kind], editing(token, value)) for layer, kind, token, value in edits]
    hooks += [(block[kind], recording(layer, kind)) for layer, block in enumerate(blocks) for kind in kinds()]
    with hooked(hooks, 1), lifted():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits, seen


def edits_of(interventions, own, sources):
    """The interventions as edits; ``sources`` has the recorded values of each run that values can come from."""
    edits = []
    for each in interventions:
        taken = each.tokens if each.source_tokens is None else each.source_tokens
        for layer in each.layers:
            for token, source_token in zip(each.tokens, taken, strict=True):
                if isinstance(each.source, torch.Tensor):
                    value = each.source
                elif each.source == "zero":
                    value = 0.0
                else:
                    value = sources[each.source][layer, each.site][source_token]
                edits.append((layer, each.site, token, value))
    return edits


def assert_like_hooks(model, prompt, runs, base="clean"):
    (result,) = cc.Tracer(model, tokenizer()).run([prompt], runs, READS, base=base)
    texts = {"clean": ids_of(prompt.text), "other": ids_of(prompt.others[0])}
    sources = {name: forward(model, ids) for name, ids in texts.items()}
    values = {name: seen for name, (_, seen) in sources.items()}
    target = int(sources["clean"][0][-1].argmax())
    for number, interventions in enumerate(runs):
        logits, seen = forward(model, texts[base], edits_of(interventions, texts[base], values))
        p = float(logits[-1].log_softmax(-1)[target].exp())
        assert result.patched.p[0, number] == pytest.approx(p, abs=1e-9)
        found = [value[0, number] for value in result.patched.values]
        torch.testing.assert_close(found[0], logits[-1:], rtol=0, atol=1e-9)
        expected = torch.stack([seen[layer, "hidden"][[0, -1]] for layer in range(LAYERS)])
        torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(found[2][0], seen[1, "mlp"][1:2], rtol=0, atol=1e-9)
        torch.testing.assert_close(found[3][0], seen[2, "attn"][2:3], rtol=0, atol=1e-9)
    for name, runs_of in (("clean", result.clean), ("other", result.others)):
        torch.testing.assert_close(runs_of.values[0][0, 0], sources[name][0][-1:], rtol=0, atol=1e-9)
    return result


@st.composite
def patchings(draw):
    """A model, a prompt with another text, and runs of random interventions."""
    model = network(draw(st.sampled_from(["gpt2", "llama", "gptj", "gemma3_text"])))
    head_dim = getattr(model.config, "head_dim", None) or WIDTH // HEADS
    text, other = draw(st.permutations(TEXTS))[:2]
    shorter = min(len(ids_of(text)), len(ids_of(other)))
    numbers = st.integers(0, LAYERS - 1)

    def intervention():
        kind = draw(st.sampled_from(kinds()))
        source = draw(st.sampled_from(["clean", "other", "zero", "vector"]))
        tokens = draw(st.lists(st.integers(0, shorter - 1), min_size=1, max_size=3, unique=True))
        taken = draw(st.none() | st.permutations(range(shorter)).map(lambda order: tuple(order[: len(tokens)])))
        if source == "vector":
            generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
            width = head_dim if kind.startswith("head") else WIDTH
            source = torch.randn(width, generator=generator, dtype=torch.float64)
        free = isinstance(source, torch.Tensor) or source == "zero"
        layers = tuple(draw(st.lists(numbers, min_size=1, max_size=2, unique=True)))
        return cc.Intervention(kind, layers, tuple(tokens), source, None if free else taken)

    runs = [[intervention() for _ in range(draw(st.integers(1, 3)))] for _ in range(draw(st.integers(1, 4)))]
    return model, cc.Prompt(text, others=(other,)), runs


@settings(max_examples=60, deadline=None, derandomize=True)
@given(patching=patchings())
def test_any_interventions(patching):
    assert_like_hooks(*patching)


def test_from_the_other_run():
    """Denoising and noising: the same patch from either side."""
    prompt = cc.Prompt(TEXTS[1], others=(TEXTS[2],))
    runs = [[cc.Intervention("hidden", (layer,), (-1,), "clean")] for layer in range(LAYERS)]
    result = assert_like_hooks(network(), prompt, runs, base="other")
    np.testing.assert_allclose(result.patched.p[0, -1], result.clean.p[0, 0], rtol=0, atol=1e-12)
    assert abs(result.patched.p[0, 0] - result.clean.p[0, 0]) > 1e-6


def test_tracing_is_made_of_the_same():
    """Restoring states of corrupted runs by hand gives the rows of the trace table."""
    facts, options = [FACTS[0], FACTS[1]], {"sigma": 0.5, "samples": 3}
    tracer = cc.Tracer(network(), tokenizer())
    table = tracer.trace(facts, (("mlp", 1),), tokens="subject_last", **options).to_pylist()
    runs = [[cc.Intervention("mlp", layer, "subject_last")] for layer in range(LAYERS)]
    results = tracer.run(facts, runs, base="corrupted", **options)
    for fact, result in zip(facts, results, strict=True):
        rows = [row for row in table if row["fact_id"] == fact.id]
        np.testing.assert_allclose(result.patched.p.mean(0), [row["p_patched"] for row in rows], rtol=0, atol=1e-12)
        np.testing.assert_allclose(result.corrupted.p.mean(), rows[0]["p_corrupted"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(result.clean.p.mean(), rows[0]["p_clean"], rtol=0, atol=1e-12)


def test_targets_of_several_tokens_and_other_prompts_lengths():
    prompt = cc.Prompt(TEXTS[0], target="in Seattle", others=(TEXTS[1],))
    model = network()
    runs = [[cc.Intervention("hidden", (1,), (2, 3), "other", (0, 4))]]
    (result,) = cc.Tracer(model, tokenizer()).run([prompt], runs)
    target = tokenizer()(" in Seattle", add_special_tokens=False)["input_ids"]
    ids, other = (ids_of(text) + target[:-1] for text in (prompt.text, prompt.others[0]))
    assert len(target) > 1
    _, seen = forward(model, other)
    edits = edits_of(runs[0], ids, {"other": seen})
    for found, tokens, changes in ((result.patched, ids, edits), (result.clean, ids, ()), (result.others, other, ())):
        logits, _ = forward(model, tokens, changes)
        log_p = logits.log_softmax(-1)[range(len(tokens) - len(target), len(tokens)), target].sum()
        assert found.p[0, 0] == pytest.approx(float(log_p.exp()), rel=1e-9)


def test_many_prompts_with_a_vector_each():
    prompts = list(TEXTS)
    vectors = torch.randn(len(prompts), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    runs = [[cc.Intervention("hidden", 1, -1, vectors)]]
    results = cc.Tracer(network(), tokenizer()).run(prompts, runs, [cc.Read("logits")])
    for text, vector, result in zip(prompts, vectors, results, strict=True):
        logits, _ = forward(network(), ids_of(text), [(1, "hidden", -1, vector)])
        torch.testing.assert_close(result.patched.values[0][0, 0], logits[-1:], rtol=0, atol=1e-9)


def test_the_other_prompt_of_a_fact_is_the_counterfactual_one():
    fact = cc.Fact("0", "{} plays the sport of", "Ann Lee", "tennis", counterfactual_subject="Bo Lee")
    tracer = cc.Tracer(network(), tokenizer())
    (result,) = tracer.run([fact], [[cc.Intervention("hidden", 0, "all", "other")]])
    swapped = oracle.trace(
        network(), tokenizer(), [fact], (("hidden", 1),), noise=cc.Noise("counterfactual"), tokens="last"
    )
    assert result.others.p[0, 0] == pytest.approx(swapped[0]["p_corrupted"], abs=1e-9)
    assert result.patched.p[0, 0] == pytest.approx(swapped[0]["p_corrupted"], abs=1e-9)


@pytest.mark.parametrize(
    ("prompts", "runs", "reads", "base", "message"),
    [
        (["Bo is"], [cc.Intervention("hidden", 3, 0)], (), "clean", "no layer 3.*0 to 2"),
        (["Bo is"], [cc.Intervention("hidden", -1, 0)], (), "clean", "no layer -1"),
        (["Bo is"], [cc.Intervention("hidden", 0, 9)], (), "clean", "token 9 is outside"),
        (["Bo is"], [cc.Intervention("residual", 0, 0)], (), "clean", "unknown kind 'residual'"),
        (["Bo is"], [cc.Intervention("head.4", 0, 0)], (), "clean", "no head 4"),
        (["Bo is"], [cc.Intervention("hidden", 0, "subject")], (), "clean", "need a fact"),
        (["Bo is"], [cc.Intervention("hidden", 0, 0, "corrupted")], (), "clean", "no fact"),
        (["Bo is"], [cc.Intervention("hidden", 0, 0, "other")], (), "clean", "no source 'other'"),
        (["Bo is"], [cc.Intervention("hidden", 0, 0)], (), "other", "no base"),
        (["Bo is"], [cc.Intervention("hidden", 0, 0, torch.zeros(3))], (), "clean", r"give \(32,\)"),
        (["Bo is"], [cc.Intervention("hidden", 0, (0, 1), "clean", (0,))], (), "clean", "give as many"),
        (["Bo is"], [cc.Intervention("hidden", 0, 0), [cc.Intervention("mlp", 0, 0)]], (), "clean", "mix"),
        ([""], [cc.Intervention("hidden", 0, 0)], (), "clean", "empty"),
        (["Bo is"], [cc.Intervention("hidden", 0, 0)], [("logits", 9)], "clean", "token 9"),
    ],
)
def test_what_makes_no_sense_is_named(prompts, runs, reads, base, message):
    with pytest.raises(cc.CausalconeError, match=message):
        cc.Tracer(network(), tokenizer()).run(prompts, runs, [cc.Read(*read) for read in reads], base=base)


def test_reads_that_make_no_sense():
    with pytest.raises(cc.CausalconeError, match="needs layers"):
        cc.Read("hidden")
    with pytest.raises(cc.CausalconeError, match="takes no layers"):
        cc.Read("logits", layers=1)
    with pytest.raises(cc.CausalconeError, match="cannot read"):
        cc.Read("embedding")
