"""Interventions of one's own give what hooks on the model give, one run at a time."""

import functools

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES
from helpers.lifting import lifted
from helpers.models import FACTS, tokenizer
from hypothesis import given, settings, strategies as st
from oracles import tracing as oracle
from oracles.model import hooked, sites

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


@pytest.mark.slow
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


@pytest.mark.parametrize("order", [1, -1])
def test_prompts_with_and_without_a_target_of_one_length(order):
    first, second = "In the city of Bo they speak", "In the city of Rome they speak"
    assert len(ids_of(first)) == len(ids_of(second))
    prompts = [first, cc.Prompt(second, target="golf")][::order]
    runs = [[cc.Intervention("mlp", 1, -1, "zero")]]
    together = cc.Tracer(network(), tokenizer()).run(prompts, runs)
    for prompt, result in zip(prompts, together, strict=True):
        (alone,) = cc.Tracer(network(), tokenizer()).run([prompt], runs)
        np.testing.assert_allclose(result.patched.p, alone.patched.p, rtol=1e-9)
        np.testing.assert_allclose(result.clean.p, alone.clean.p, rtol=1e-9)


def test_texts_of_which_one_begins_the_other():
    """The same row predicts the first target token of the one and the second of the other."""
    words = tokenizer()(" in Seattle", add_special_tokens=False)["input_ids"]
    text = TEXTS[0] + tokenizer().decode(words[:1])
    assert ids_of(text) == ids_of(TEXTS[0]) + words[:1]
    prompt = cc.Prompt(text, target="in Seattle", others=(TEXTS[0],))
    (result,) = cc.Tracer(network(), tokenizer()).run([prompt], [[cc.Intervention("hidden", 0, 0, "other")]])
    for found, own in ((result.clean, text), (result.others, TEXTS[0])):
        ids = ids_of(own) + words[:-1]
        log_p = forward(network(), ids)[0].log_softmax(-1)[range(len(ids) - len(words), len(ids)), words].sum()
        assert found.p[0, 0] == pytest.approx(float(log_p.exp()), rel=1e-9)


def test_replacing_noise():
    tracer, noise = cc.Tracer(network(), tokenizer()), cc.Noise(replace=True)
    options = {"sigma": 0.5, "samples": 2, "noise": noise}
    (result,) = tracer.run([FACTS[0]], [[cc.Intervention("hidden", 1, "last")]], base="corrupted", **options)
    row = tracer.trace([FACTS[0]], (("hidden", 1),), tokens="last", **options).to_pylist()[1]
    assert result.corrupted.p.mean() == pytest.approx(row["p_corrupted"], abs=1e-12)
    assert result.patched.p.mean() == pytest.approx(row["p_patched"], abs=1e-12)


def test_iterators_serve_every_prompt():
    each = cc.Intervention("mlp", (layer for layer in range(LAYERS)), -1, "zero")
    runs = ([each] for _ in range(2))
    results = cc.Tracer(network(), tokenizer()).run((text for text in TEXTS[:2]), runs)
    for text, result in zip(TEXTS[:2], results, strict=True):
        (alone,) = cc.Tracer(network(), tokenizer()).run([text], [cc.Intervention("mlp", range(LAYERS), -1, "zero")])
        np.testing.assert_allclose(result.patched.p, [[alone.patched.p[0, 0]] * 2], rtol=1e-12)


def test_the_counterfactual_prompt_of_a_fact_is_run_where_it_is_asked_for():
    fact = cc.Fact("0", "{} plays the sport of", "Ann Lee", "tennis", counterfactual_subject="Danielle Darrieux")
    reads = [cc.Read("hidden", "subject_last", 1)]
    (result,) = cc.Tracer(network(), tokenizer()).run([fact], [cc.Intervention("mlp", 0, -1, "zero")], reads)
    assert result.others.p.shape == (1, 0)
    assert result.patched.values[0].shape == (1, 1, 1, 1, WIDTH)


@pytest.mark.parametrize(
    ("prompts", "runs", "reads", "base", "message"),
    [
        (["Bo is"], [cc.Intervention("hidden", 3, 0)], (), "clean", "no layer 3.*0 to 2"),
        (["Bo is"], [cc.Intervention("hidden", -1, 0)], (), "clean", "no layer -1"),
        (["Bo is"], [cc.Intervention("hidden", 0, 9)], (), "clean", "token 9 is outside"),
        (["Bo is"], [cc.Intervention("head.4", 0, 0)], (), "clean", "no head 4"),
        (["Bo is"], [cc.Intervention("hidden", 0, "subject")], (), "clean", "need a fact"),
        (["Bo is"], [cc.Intervention("hidden", 0, 0, "corrupted")], (), "clean", "no fact"),
        (["Bo is"], [cc.Intervention("hidden", 0, 0, "other")], (), "clean", "no source 'other'"),
        (["Bo is"], [cc.Intervention("hidden", 0, 0)], (), "other", "no base"),
        (["Bo is"], [cc.Intervention("hidden", 0, 0, torch.zeros(3))], (), "clean", r"give \(32,\)"),
        (["Bo is"], [cc.Intervention("hidden", 0, (0, 1), "clean", (0,))], (), "clean", "give as many"),
        (["Bo is"], [cc.Intervention("hidden", 0, 0, torch.zeros(2, WIDTH))], (), "clean", r"or \(1, 32\)"),
        (["Bo is"], [cc.Intervention("hidden", 0, 0, torch.full((WIDTH,), torch.nan))], (), "clean", "NaN"),
        ([cc.Prompt("Bo is", target="")], [cc.Intervention("hidden", 0, 0)], (), "clean", "target.* is empty"),
        ([cc.Prompt("Bo is", "in Seattle", ("Bo " * 63,))], [cc.Intervention("mlp", 0, 0)], (), "clean", "positions"),
        ("Bo is", [cc.Intervention("hidden", 0, 0)], (), "clean", "list"),
        (["Bo is"], cc.Intervention("hidden", 0, 0), (), "clean", "list"),
        (["Bo is"], [["hidden"]], (), "clean", "not an intervention"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("residual", 0, 0), "unknown kind 'residual'"),
        (("heads", 0, 0), "head.N"),
        (("hidden", 0.5, 0), "layers"),
        (("hidden", 0, (1.5,)), "tokens"),
        (("hidden", 0, 0, None), "source"),
        (("hidden", 0, 0, "zero", 1), "source_tokens"),
    ],
)
def test_interventions_that_make_no_sense(arguments, message):
    with pytest.raises(cc.CausalconeError, match=message):
        cc.Intervention(*arguments)


def test_a_counterfactual_prompt_is_no_noise():
    with pytest.raises(cc.CausalconeError, match="other"):
        cc.Tracer(network(), tokenizer()).run(
            [FACTS[0]], [cc.Intervention("mlp", 0, 0)], base="corrupted", noise="counterfactual"
        )
