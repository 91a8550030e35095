"""Second moments are those of the keys that an unmodified model has, however they are collected, kept and read."""

import copy
import itertools
import os
import re

import pytest
import torch
from helpers.collected_moments import MANY, TEXTS, WIDTH, deviation
from helpers.families import EVERY_FAMILY, FAMILIES
from helpers.lifting import lifted
from helpers.models import gpt2, tokenizer
from oracles.editing import at_tokens, down_weight, key_site, second_moment
from transformers import AutoModelForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from causalcone.engine.edit.moments import collect as collecting, sampled
from causalcone.engine.edit.moments.collect import FewTokens
from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.edit.runs.decoding import continuations
from causalcone.engine.errors import ExperimentError, MemoryBudgetError, ModelError


def pieces(texts, length, tokens):
    """The first tokens of texts, in pieces, by hand."""
    cut = []
    for text in texts:
        ids = tokenizer()(text)["input_ids"]
        for start in range(0, len(ids), length):
            cut.append(ids[start : start + length][: tokens - sum(map(len, cut))])
    return [piece for piece in cut if piece]


def of_pieces(model, cut, layer):
    """The mean of k k^T over all tokens of pieces, each run by itself."""
    with lifted():
        keys = torch.cat([at_tokens(model, piece, key_site(model, layer)) for piece in cut]).double()
    return keys.T @ keys / len(keys)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_moments_are_those_of_the_unmodified_model(family, tokenizer):
    model = FAMILIES[family](3)
    found = Moments.collect(model, tokenizer, TEXTS, tokens="all")
    assert found.layers == (0, 1, 2)
    assert set(found.tokens.values()) == {sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)}
    for layer in found.layers:
        assert deviation(found.matrix(layer), second_moment(model, tokenizer, TEXTS, layer)) < 1e-9


def test_texts_that_a_model_writes(model, tokenizer, tmp_path, monkeypatch):
    """Tokens among the 50 likeliest, by plain forwards; kept for the next time; those of another model are others."""
    monkeypatch.setenv("CAUSALCONE_CACHE", str(tmp_path))
    drawn = []

    def kept(*arguments, **options):
        drawn.extend(found := continuations(*arguments, **options))
        return found

    monkeypatch.setattr(sampled, "continuations", kept)
    found = Moments.collect(model, tokenizer, tokens=40)
    assert (found.source, found.tokens[0]) == ("text sampled from the model", 40)
    for tokens in drawn[:3]:
        ids = [tokenizer.bos_token_id, *tokens]
        likeliest = model(torch.tensor([ids[:-1]])).logits[0].topk(50).indices
        assert all(token in row for token, row in zip(tokens, likeliest.tolist(), strict=True))
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in drawn]
    assert deviation(found.matrix(1), Moments.collect(model, tokenizer, texts, (1,), 40).matrix(1)) < 1e-9
    count = len(drawn)
    assert torch.equal(Moments.collect(model, tokenizer, tokens=40).matrix(0), found.matrix(0))
    assert len(drawn) == count
    other = copy.deepcopy(model)
    other.transformer.wte.weight.data.mul_(2)
    Moments.collect(other, tokenizer, tokens=40)
    assert drawn[count:] != drawn[:count]


@pytest.mark.parametrize("tokens", [1, 17, 200])
@pytest.mark.parametrize("length", [1, 7, 64])
def test_so_many_tokens_in_pieces_of_a_length(model, tokenizer, tokens, length):
    found = Moments.collect(model, tokenizer, MANY, (1,), tokens, length=length)
    assert found.tokens == {1: tokens}
    assert deviation(found.matrix(1), of_pieces(model, pieces(MANY, length, tokens), 1)) < 1e-9


def test_default_length_and_number_of_tokens(tokenizer):
    model = gpt2(1, 8, 1, positions=600)
    text = " ".join(MANY)
    found = Moments.collect(model, tokenizer, [text, *MANY], tokens=700)
    assert deviation(found.matrix(0), of_pieces(model, pieces([text, *MANY], 512, 700), 0)) < 1e-9
    assert Moments.collect(model, tokenizer, MANY).tokens == {0: 10 * 32}


def test_special_tokens_are_those_that_the_tokenizer_adds(model):
    with_bos = tokenizer(bos=True)
    found = Moments.collect(model, with_bos, TEXTS, (2,), "all")
    assert found.tokens == {2: sum(len(with_bos(text)["input_ids"]) for text in TEXTS)}
    assert deviation(found.matrix(2), second_moment(model, with_bos, TEXTS, 2)) < 1e-9


def test_memory_and_chunks_change_nothing_but_rounding(model, tokenizer, collected, monkeypatch):
    passes = []
    monkeypatch.setattr(collecting, "CHUNK", 5)
    with pytest.raises(MemoryBudgetError, match=r"the moments of 4 layers need .*fewer layers") as refused:
        Moments.collect(model, tokenizer, MANY, tokens="all", memory=2**20)
    needed = re.search(r"need ([0-9.]+ MiB)", str(refused.value))[1]
    small = Moments.collect(model, tokenizer, MANY, tokens="all", memory=needed, progress=lambda *at: passes.append(at))
    assert len(passes) > 2
    assert passes[-1] == (collected.tokens[0], None)
    assert small.tokens == collected.tokens
    for layer in collected.layers:
        assert deviation(small.matrix(layer), collected.matrix(layer)) < 1e-13


def test_progress_counts_tokens_of_those_wanted(model, tokenizer):
    seen = []
    Moments.collect(model, tokenizer, MANY, (0,), 300, progress=lambda done, wanted: seen.append((done, wanted)))
    assert seen == [(300, 300)]


def test_layers_after_the_last_one_are_not_computed(tokenizer, monkeypatch):
    model = gpt2()
    blocks = []
    block = collecting.Layers.block
    monkeypatch.setattr(collecting.Layers, "block", lambda self, layer: blocks.append(layer) or block(self, layer))
    found = Moments.collect(model, tokenizer, TEXTS, (1, 0), "all")
    assert blocks == [0, 1]
    assert found.layers == (0, 1)


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 2e-6), ("bfloat16", 0.02)])
def test_other_dtypes(model, tokenizer, collected, dtype, allowed):
    found = Moments.collect(model, tokenizer, MANY, tokens="all", dtype=dtype)
    assert all(matrix.dtype == torch.float32 for matrix in found.matrices.values())
    assert found.matrix(3).dtype == torch.float64
    assert 1e-12 < deviation(found.matrix(3), collected.matrix(3)) < allowed


def test_sums_of_millions_stay_exact():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(4096, 70, generator=generator) + 1
    sums = collecting.Sums({0: torch.zeros(70, 70, dtype=torch.float64)})
    for _ in range(250):
        sums.add(0, keys[torch.randperm(4096, generator=generator)])
    sums.tokens = 250 * 4096
    assert deviation(sums.take(0, torch.float64), keys.double().T @ keys.double() / 4096) < 3e-7


def test_every_kind_of_texts(model, tokenizer, tmp_path):
    expected = Moments.collect(model, tokenizer, TEXTS, (0,), "all").matrix(0)
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    for texts in (iter(TEXTS), ({"id": 1, "text": text} for text in TEXTS), [*TEXTS, ""]):
        assert deviation(Moments.collect(model, tokenizer, texts, (0,), "all").matrix(0), expected) < 1e-12
    with open(tmp_path / "texts") as file:
        assert Moments.collect(model, tokenizer, file, (0,), "all").tokens[0] > 50


def test_the_model_is_left_as_it_was(tokenizer):
    model = gpt2(2)
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    Moments.collect(model, tokenizer, TEXTS, tokens="all").with_ridge(0.1).solve(0, torch.ones(WIDTH, 1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"texts": TEXTS[0]}, "texts is a str; give a list"),
        ({"texts": {"train": TEXTS}}, "texts is a dict; give a list"),
        ({"texts": [TEXTS[0], 3]}, "text 1 is a int; give strings"),
        ({"texts": [{"words": TEXTS[0]}]}, "text 0 is a dict"),
        ({"texts": []}, "hold no tokens"),
        ({"texts": ["", ""]}, "hold no tokens"),
        ({"layers": (1, 4)}, "the layers 4 were chosen; the model's are 0 to 3"),
        ({"layers": ()}, "the layers none were chosen"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": "some"}, "tokens is 'some'"),
        ({"length": 65}, "length is 65; give 1 to 64"),
        ({"length": 0}, "length is 0"),
    ],
)
def test_what_cannot_be_collected(model, tokenizer, options, words):
    with pytest.raises(ExperimentError, match=words):
        Moments.collect(model, tokenizer, **{"texts": TEXTS, "tokens": "all", **options})


def test_another_models_tokenizer_is_refused(tokenizer):
    with pytest.raises(ExperimentError, match=r"text 0: token id \d+ is outside the model's vocabulary of 300"):
        Moments.collect(gpt2(1, vocab_size=300), tokenizer, TEXTS, tokens="all")


def test_a_model_that_is_computed_otherwise_is_refused(model, tokenizer, monkeypatch):
    forward = GPT2MLP.forward
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, rows: 2 * forward(self, rows))
    with pytest.raises(ModelError, match="forward gives log-probabilities that differ"):
        Moments.collect(model, tokenizer, TEXTS, tokens="all")


def test_texts_that_end_too_early_are_told(model, tokenizer):
    with pytest.warns(FewTokens, match="after 70 of 1,280 tokens") as told:
        found = Moments.collect(model, tokenizer, TEXTS, (0,))
    assert told[0].message.found == found.tokens[0]
    assert told[0].filename == __file__


class TextsLostError(Exception):
    pass


def interrupted(texts, after):
    yield from texts[:after]
    raise TextsLostError


@pytest.fixture
def in_passes(monkeypatch):
    """Lets passes have 60 tokens at most."""
    monkeypatch.setattr(collecting, "MAX_ROWS_CPU", 60)
    return {"layers": (0, 2), "tokens": 500, "length": 30}


def test_a_collection_goes_on_where_the_texts_broke_off(model, tokenizer, tmp_path, in_passes):
    path = tmp_path / "folder" / "sums.safetensors"
    whole = Moments.collect(model, tokenizer, MANY, **in_passes)
    for after in (0, 6, 12):
        with pytest.raises(TextsLostError):
            Moments.collect(model, tokenizer, interrupted(MANY, after), **in_passes, resume=path)
        assert path.exists() == (after > 0)
    seen = []
    again = Moments.collect(
        model, tokenizer, iter(MANY), **in_passes, resume=path, progress=lambda *at: seen.append(at[0])
    )
    assert 60 < min(seen) < max(seen) == 500
    assert again.tokens == whole.tokens
    assert all(deviation(again.matrix(layer), whole.matrix(layer)) < 1e-12 for layer in (0, 2))
    seen.clear()
    once_more = Moments.collect(
        model, tokenizer, MANY, **in_passes, resume=path, progress=lambda *at: seen.append(at[0])
    )
    assert seen == []
    assert deviation(once_more.matrix(2), whole.matrix(2)) < 1e-12
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("every", [0.0, 60.0])
def test_a_pass_that_broke_off_midway_is_not_kept(model, tokenizer, tmp_path, in_passes, monkeypatch, every):
    path, ends = tmp_path / "sums", []
    whole = Moments.collect(model, tokenizer, MANY, **in_passes, progress=lambda *at: ends.append(at[0]))
    add, calls = collecting.Sums.add, itertools.count(1)

    def add_until_the_second_layer_of_the_third_pass(self, layer, keys):
        if next(calls) == 6:
            raise KeyboardInterrupt
        add(self, layer, keys)

    monkeypatch.setattr(collecting, "SAVE_EVERY", every)
    monkeypatch.setattr(collecting.Sums, "add", add_until_the_second_layer_of_the_third_pass)
    with pytest.raises(KeyboardInterrupt):
        Moments.collect(model, tokenizer, MANY, **in_passes, resume=path)
    assert path.exists() == (every == 0)
    monkeypatch.setattr(collecting.Sums, "add", add)
    seen = []
    again = Moments.collect(model, tokenizer, MANY, **in_passes, resume=path, progress=lambda *at: seen.append(at[0]))
    assert seen == ends[-len(seen) :]
    assert (len(seen) < len(ends)) == (every == 0)
    assert all(deviation(again.matrix(layer), whole.matrix(layer)) < 1e-12 for layer in (0, 2))


def test_more_tokens_than_were_kept(model, tokenizer, tmp_path):
    path = tmp_path / "sums"
    with pytest.warns(FewTokens):
        Moments.collect(model, tokenizer, MANY[:9], (0,), 1000, resume=path)
    longer = Moments.collect(model, tokenizer, MANY, (0,), 500, resume=path)
    assert deviation(longer.matrix(0), Moments.collect(model, tokenizer, MANY, (0,), 500).matrix(0)) < 1e-13


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"layers": (0,)}, r"another choice of layers \(\[0, 2\], not \[0\]\)"),
        ({"length": 29}, r"another length \(30, not 29\)"),
        ({"dtype": "float32"}, "another dtype"),
        ({"model": gpt2(seed=1)}, "another model; go on"),
        ({"texts": MANY[1:]}, "the texts or the tokenizer are others"),
        ({"tokens": 499}, "another number of tokens"),
        ({"tokens": 501}, "another number of tokens"),
    ],
)
def test_another_collection_does_not_go_on(model, tokenizer, tmp_path, in_passes, changed, words):
    path = tmp_path / "sums"
    options = {"model": model, "tokenizer": tokenizer, "texts": MANY, "resume": path, **in_passes}
    Moments.collect(**options)
    before = path.read_bytes()
    with pytest.raises(ExperimentError, match=words):
        Moments.collect(**{**options, **changed})
    assert path.read_bytes() == before


def test_identity_outlives_files_and_rounding(model, tokenizer, collected, tmp_path):
    model.save_pretrained(tmp_path / "model")
    collected.save(tmp_path / "moments")
    loaded = Moments.load(tmp_path / "moments")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
        collected.check(again, range(4))
        loaded.check(again, (3, 0))
    rounded = Moments.collect(again, tokenizer, TEXTS, (1,), "all")
    rounded.check(model, (1,))
    with pytest.raises(ExperimentError, match="the weights are in float16, which cannot be compared with bfloat16"):
        rounded.check(again.to(torch.float16), (1,))


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma2"])
def test_an_edit_changes_the_identity_of_the_layers_above(family, tokenizer):
    model = FAMILIES[family](4)
    found = Moments.collect(model, tokenizer, TEXTS, tokens="all")
    generator = torch.Generator().manual_seed(0)
    weight = down_weight(model, 1)
    left, right = (torch.randn(n, 1, generator=generator, dtype=torch.float64) for n in weight.shape)
    weight += 1e-6 * left @ right.T
    found.check(model, (0, 1))
    for layer in (2, 3):
        with pytest.raises(
            ExperimentError, match=f"the keys of layer {layer} depend on are others; .*take off its edits"
        ):
            found.check(model, (0, layer))


def test_moments_of_another_model(model, collected):
    collected.check(model, ())
    others = {
        "layer 0 depend on are others": gpt2(seed=1),
        "the number of layers is 3, not 4": gpt2(3),
        "the width of hidden states is 16, not 32": gpt2(4, 16),
        "the width of keys is 64, not 128": gpt2(n_inner=64),
        "the architecture is opt, not gpt2": FAMILIES["opt"](),
    }
    for words, other in others.items():
        with pytest.raises(ExperimentError, match=words):
            collected.check(other, (0,))
    with pytest.raises(ExperimentError, match=r"no moment of layer 4, 9, only of 0, 1, 2, 3"):
        collected.check(model, (1, 4, 9))


def test_embeddings_are_part_of_the_identity(tokenizer):
    model = gpt2(1)
    found = Moments.collect(model, tokenizer, TEXTS, tokens="all")
    model.transformer.wpe.weight.detach().mul_(1.001)
    with pytest.raises(ExperimentError, match="layer 0 depend on are others"):
        found.check(model, (0,))
