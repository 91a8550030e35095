"""Decoding many texts at once against a plain loop: the unmodified model anew on every text, token by token."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.families import EVERY_FAMILY, FAMILIES
from helpers.models import gpt2
from oracles.editing import Change, Prompt, changed, down, down_weight, noising, run
from oracles.model import precision
from oracles.requests import greedy

from causalcone.engine.edit.deltas.delta import Delta, Dense, LowRank
from causalcone.engine.edit.runs import decoding
from causalcone.engine.edit.runs.decoding import decode, draw, text_seed
from causalcone.engine.edit.runs.layers import Layers
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.errors import ExperimentError, MemoryBudgetError, ModelError
from causalcone.engine.models import read_architecture
from causalcone.kernels.attention import attend
from causalcone.kernels.tiles import Tiles

PROMPTS = ((7, 300, 41, 5, 99, 12, 210), (3,), (250, 17, 80), (11, 12, 13, 14, 15), (90, 80, 70), (1, 2))
LENGTHS = (6, 12, 1, 12, 0, 9)
SEEDS = (4, 2**40, 0, 77, 5, 6)
SIGMA = 0.8
NOISED = {0: (2, 5), 3: (0, 2)}
"""The tokens of some prompts that carry noise."""

MANY = ("gpt2", "llama", "gemma2", "gptj", "opt", "gpt_neo", "qwen2")


def layers_of(model, tiles=None):
    return Layers(read_architecture(model), tiles or Tiles(), model.dtype, torch.device("cpu"))


def texts_of(model, noised=()):
    texts = [Text(prompt) for prompt in PROMPTS]
    width = model.get_input_embeddings().embedding_dim
    for number in noised:
        start, end = NOISED[number]
        noise = SIGMA * np.random.RandomState(1).randn(1, end - start, width)[0]
        texts[number] = Text(PROMPTS[number], noise, start)
    return texts


def hooks_of(model, number, noised):
    return noising(model, Prompt(list(PROMPTS[number]), NOISED[number]), SIGMA) if number in noised else ()


def plain(model, noised=(), changes=None, top_k=None):
    """How each text goes on by itself, under its own change of weights: by the likeliest tokens, or drawn."""
    found = []
    for number, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        hooks = hooks_of(model, number, noised)
        with changed(model, {} if changes is None else changes[number]):
            found.append(
                tuple(greedy(model, prompt, length, hooks))
                if top_k is None
                else sampled(model, prompt, length, hooks, top_k, SEEDS[number])
            )
    return found


@torch.no_grad()
def sampled(model, prompt, length, hooks, top_k, seed):
    """Tokens drawn with the numbers of the seed's generator: along the likeliest tokens, from the first one on, to
    where their share of the probability exceeds the number."""
    draws = torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    tokens = list(prompt)
    with precision(model, lift=True):
        for draw in draws.tolist():
            p = run(model, tokens, hooks)[0, -1].exp().tolist()
            likeliest = sorted(range(len(p)), key=lambda token: -p[token])[:top_k]
            rest = draw * sum(p[token] for token in likeliest)
            for token in likeliest:
                rest -= p[token]
                if rest < 0:
                    break
            tokens.append(token)
    return tuple(tokens[len(prompt) :])


# --- tokens ---


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_likeliest_tokens(family):
    model = FAMILIES[family](layers=3)
    expected = plain(model, noised=NOISED)
    assert decode(layers_of(model), texts_of(model, NOISED), LENGTHS) == expected
    assert expected != plain(model)
    assert [len(tokens) for tokens in expected] == list(LENGTHS)


def test_in_single_precision():
    model = gpt2(dtype=torch.float32)
    assert decode(layers_of(model), texts_of(model), LENGTHS) == plain(model)


@pytest.mark.parametrize("family", MANY)
def test_drawn_tokens(family):
    model = FAMILIES[family](layers=3)
    found = decode(layers_of(model), texts_of(model, NOISED), LENGTHS, top_k=5, seeds=SEEDS)
    assert found == plain(model, NOISED, top_k=5)
    assert found != plain(model, top_k=5)


@pytest.mark.parametrize("top_k", [1, 10_000])
def test_of_one_and_of_all_tokens(model, top_k):
    found = decode(layers_of(model), texts_of(model), LENGTHS, top_k=top_k, seeds=SEEDS)
    assert found == plain(model, top_k=top_k)
    assert (found == plain(model)) == (top_k == 1)


def test_draws():
    """The shares of the probability are 1/2, 1/3 and 1/6."""
    logits = torch.tensor([[3.0, 2.0, 1.0]]).log().expand(6, 3)
    tokens = torch.tensor([[30, 10, 20]]).expand(6, 3)
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.83, 0.84, 1 - 1e-16], dtype=torch.float64)
    assert draw(logits, tokens, uniform).tolist() == [30, 30, 10, 10, 20, 20]


def test_seeds_of_texts():
    seeds = [text_seed(0, "fact", 0), text_seed(0, "fact", 1), text_seed(1, "fact", 0), text_seed(0, "other", 0)]
    assert len(set(seeds)) == 4
    assert seeds == [
        text_seed(0, "fact", 0),
        text_seed(0, "fact", 1),
        text_seed(1, "fact", 0),
        text_seed(0, "other", 0),
    ]
    assert torch.Generator().manual_seed(max(seeds))


# --- changed weights ---


def random_changes(model, seed=0):
    """A change of low rank in two layers, one of all weights in the last layer, and both as the plain loop takes
    them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return 0.7 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, inner = down_weight(model, 0).shape
    low = {layer: LowRank(random(hidden, 2), random(inner, 2) / inner**0.5) for layer in (0, 1)}
    bias = None if down(model, 2).bias is None else random(hidden)
    dense = {2: Dense(random(hidden, inner) / inner**0.5, bias)}
    plain_low = {layer: Change(change.left @ change.right.T) for layer, change in low.items()}
    return (Delta(low), Delta(dense)), (plain_low, {2: Change(dense[2].weight, bias)})


@pytest.mark.parametrize("family", MANY)
def test_changed_weights(family):
    model = FAMILIES[family](layers=3)
    (low, dense), (plain_low, plain_dense) = random_changes(model)
    layers, texts = layers_of(model), texts_of(model)
    found = decode(layers, texts, LENGTHS, top_k=400, seeds=SEEDS, deltas=[low, dense, None, low, dense, Delta({})])
    changes = [plain_low, plain_dense, {}, plain_low, plain_dense, {}]
    assert found == plain(model, changes=changes, top_k=400)
    unchanged = plain(model, top_k=400)
    assert [found[i] == unchanged[i] for i in (0, 1, 3, 5)] == [False, False, False, True]


def test_changed_weights_in_half_precision():
    """What is added is rounded with the sum, not before: it does not cancel with its own rounded value."""
    model = gpt2(layers=3, dtype=torch.bfloat16)
    low, dense = (
        Delta({layer: change.to(torch.device("cpu"), torch.float32) for layer, change in delta.changes.items()})
        for delta in random_changes(model)[0]
    )
    deltas = decoding._Deltas.of([low, dense, None], decoding._Model.of(layers_of(model)))
    keys = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    for layer, text, delta in ((0, 0, low), (2, 1, dense)):
        more = delta.changes[layer].product(keys)
        values = -more.bfloat16()
        found = deltas.change(layer, lambda target: target.index)["down"](keys, values.clone())
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found[text].float(), (more + values)[text], rtol=2**-8, atol=1e-5)
        assert found[text].count_nonzero() > 16
        others = [number for number in range(3) if number != text]
        assert torch.equal(found[others], values[others])


# --- groups ---


@pytest.fixture(scope="module")
def alone(model):
    """Every text decoded by itself."""
    layers, texts, deltas = layers_of(model), texts_of(model, NOISED), deltas_of(model)
    return [
        decode(layers, [texts[i]], [LENGTHS[i]], top_k=5, seeds=[SEEDS[i]], deltas=[deltas[i]])[0]
        for i in range(len(texts))
    ]


def deltas_of(model):
    low, dense = random_changes(model)[0]
    return [low, None, dense, low, None, dense]


def all_at_once(model, tiles=None, memory=None):
    texts, deltas = texts_of(model, NOISED), deltas_of(model)
    return decode(layers_of(model, tiles), texts, LENGTHS, top_k=5, seeds=SEEDS, deltas=deltas, memory=memory)


@pytest.fixture
def groups(monkeypatch):
    """How many texts were in each of the groups."""
    seen = []

    class Counted(decoding._TextGroup):
        def __init__(self, model, tasks):
            seen.append(len(tasks))
            super().__init__(model, tasks)

    monkeypatch.setattr(decoding, "_TextGroup", Counted)
    return seen


@pytest.mark.parametrize(("memory", "expected"), [(None, [5]), (60_000, [1] * 5), (90_000, [2, 2, 1]), (10**7, [5])])
def test_groups(model, alone, groups, memory, expected):
    assert all_at_once(model, memory=memory) == alone
    assert groups == expected


@pytest.mark.parametrize("tiles", [Tiles(2, 3, 1, 100), Tiles(1000, 17, 5, 200)])
def test_tiles(model, alone, tiles):
    assert all_at_once(model, tiles) == alone


def test_memory_that_runs_out(model, alone, monkeypatch):
    enter = Layers.enter

    def enter_few(self, texts):
        if len(texts) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return enter(self, texts)

    monkeypatch.setattr(Layers, "enter", enter_few)
    assert all_at_once(model) == alone
    monkeypatch.setattr(Layers, "enter", lambda self, texts: enter_few(self, [*texts, *texts, *texts]))
    with pytest.raises(MemoryBudgetError, match="text 1 "):
        all_at_once(model)


def test_longer_begins_like_shorter(model, alone):
    layers, texts, deltas = layers_of(model), texts_of(model, NOISED), deltas_of(model)
    lengths = [length + 5 for length in LENGTHS]
    longer = decode(layers, texts, lengths, top_k=5, seeds=SEEDS, deltas=deltas)
    assert [tokens[:length] for tokens, length in zip(longer, LENGTHS, strict=True)] == alone


def test_all_positions(model):
    """The last token needs no position: it is never read."""
    layers = layers_of(model)
    (tokens,) = decode(layers, [Text(PROMPTS[0])], [58])
    assert tokens == tuple(greedy(model, PROMPTS[0], 58))
    with pytest.raises(ExperimentError, match=r"text 1 has 7 tokens .* 59.* 65 positions; the model has 64"):
        decode(layers, [Text((1,)), Text(PROMPTS[0])], [2, 59])


def test_nothing_to_decode(model):
    assert decode(layers_of(model), [], []) == []
    assert decode(layers_of(model), [Text((1, 2))], [0]) == [()]


# --- what makes no sense ---


@pytest.mark.parametrize(
    ("texts", "lengths", "options", "match"),
    [
        ([Text((1,))], [1, 2], {}, "1 texts and 2 lengths"),
        ([Text((1,))], [1], {"top_k": 5, "seeds": [1, 2]}, "2 seeds"),
        ([Text((1,))], [1], {"deltas": []}, "0 deltas"),
        ([Text((1,))], [1], {"top_k": 5}, "seeds"),
        ([Text((1,))], [1], {"seeds": [5]}, "top_k"),
        ([Text((1,))], [1], {"top_k": 0, "seeds": [5]}, "top_k is 0"),
        ([Text((1,)), Text(())], [1, 1], {}, "text 1 has no tokens"),
        ([Text((1,))], [-1], {}, "text 0 .* -1"),
        ([Text((1,))], [1], {"deltas": [Delta({4: LowRank(torch.ones(32, 1), torch.ones(128, 1))})]}, "layer 4"),
        ([Text((1,))], [1], {"deltas": [Delta({0: LowRank(torch.ones(128, 1), torch.ones(32, 1))})]}, r"\(128, 32\)"),
    ],
)
def test_refused(model, texts, lengths, options, match):
    with pytest.raises(ExperimentError, match=match):
        decode(layers_of(model), texts, lengths, **options)


def test_too_little_memory(model):
    with pytest.raises(MemoryBudgetError, match=r"text 1 needs .* give more memory"):
        decode(layers_of(model), texts_of(model), LENGTHS, memory=1000)


def test_infinite_logits(model):
    endless = Delta({0: LowRank(torch.full((32, 1), float("inf")), torch.ones(128, 1))})
    for options in ({}, {"top_k": 5, "seeds": [1, 2]}):
        with pytest.raises(ModelError, match="text 1: logits are not finite"):
            decode(layers_of(model), [Text((1,)), Text((1, 2))], [3, 3], deltas=[None, endless], **options)


# --- attention with a mask for each run ---


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("form", ["cpu", "gradient", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_masks_of_runs(form, softcap):
    """Runs under masks of their own get what each gets alone."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(shape, generator=generator).to("cuda" if form == "cuda" else "cpu")
        for shape in ((5, 2, 6, 4), (5, 7, 3, 4), (5, 7, 3, 4))
    )
    visible = torch.rand(5, 2, 7, generator=generator).to(query.device) < 0.5
    visible[..., 0] = True
    query.requires_grad_(form == "gradient")
    together = attend(query, keys, values, visible, 0.5, softcap)
    for i in range(5):
        one = attend(query[i : i + 1], keys[i : i + 1], values[i : i + 1], visible[i], 0.5, softcap)
        torch.testing.assert_close(together[i : i + 1], one, rtol=1e-5, atol=1e-6)
    assert together.requires_grad == (form == "gradient")


def test_texts_are_not_changed(model):
    texts = texts_of(model, NOISED)
    before = [dataclasses.replace(text, noise=None if text.noise is None else text.noise.copy()) for text in texts]
    decode(layers_of(model), texts, LENGTHS)
    for old, new in zip(before, texts, strict=True):
        assert old.tokens == new.tokens
        assert (old.noise is None and new.noise is None) or np.array_equal(old.noise, new.noise)
