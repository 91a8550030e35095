"""Second moments are those of the keys that an unmodified model has, however they are collected, kept and read."""

import copy
import itertools
import os
import re

import numpy as np
import pytest
import torch
from families import FAMILIES
from lifting import lifted
from models import FACTS, gpt2, tokenizer
from oracle_editing import at_tokens, down_weight, key_site, second_moment
from transformers import AutoModelForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from causalcone.engine.editing import collecting, moments
from causalcone.engine.editing.collecting import FewTokens
from causalcone.engine.editing.moments import Moments
from causalcone.engine.errors import ExperimentError, MemoryBudgetError, ModelError

TEXTS = [f"{fact.text} {fact.target_true}" for fact in FACTS]
MANY = [f"{a} {b}" for a, b in itertools.permutations(TEXTS, 2)]
WIDTH = 128


@pytest.fixture(scope="module")
def collected(model, tokenizer):
    """Of all layers of the model, from more tokens than its keys have components."""
    return Moments.collect(model, tokenizer, MANY, tokens="all", source="pairs of facts")


def deviation(found, expected):
    """The largest difference of two matrices, relative to the largest element."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


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


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_unmodified_model(family, tokenizer):
    model = FAMILIES[family](3)
    found = Moments.collect(model, tokenizer, TEXTS, tokens="all")
    assert found.layers == (0, 1, 2)
    assert set(found.tokens.values()) == {sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)}
    for layer in found.layers:
        assert deviation(found.matrix(layer), second_moment(model, tokenizer, TEXTS, layer)) < 1e-9


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
        assert torch.equal(Moments.collect(model, tokenizer, texts, (0,), "all").matrix(0), expected)
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
    assert all(torch.equal(again.matrix(layer), whole.matrix(layer)) for layer in (0, 2))
    seen.clear()
    once_more = Moments.collect(
        model, tokenizer, MANY, **in_passes, resume=path, progress=lambda *at: seen.append(at[0])
    )
    assert seen == []
    assert torch.equal(once_more.matrix(2), whole.matrix(2))
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
    assert all(torch.equal(again.matrix(layer), whole.matrix(layer)) for layer in (0, 2))


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


def test_solving(collected):
    keys = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(0))
    C = collected.matrix(1)
    assert C.dtype == collected.solve(1, keys).dtype == torch.float64
    torch.testing.assert_close(C @ collected.solve(1, keys), keys.double(), rtol=0, atol=1e-7)
    ridged = C + 0.03 * C.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(ridged @ collected.solve(1, keys, ridge=0.03), keys.double(), rtol=0, atol=1e-10)
    by_itself = collected.with_ridge(0.03)
    assert torch.equal(by_itself.solve(1, keys), collected.solve(1, keys, ridge=0.03))
    assert torch.equal(by_itself.solve(1, keys, ridge=0), collected.solve(1, keys))
    assert torch.equal(by_itself.matrix(1), C)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["1GiB", "6MiB"])
def test_collected_and_solved_on_a_gpu(model, tokenizer, memory):
    found = Moments.collect(model, tokenizer, MANY, tokens="all", device="cuda", memory=memory, length=16)
    here = Moments.collect(model, tokenizer, MANY, tokens="all", length=16)
    keys = torch.randn(WIDTH, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layer in found.layers:
        assert deviation(found.matrix(layer), here.matrix(layer)) < 1e-9
        solved = here.solve(layer, keys.cuda(), ridge=0.01)
        assert solved.device.type == "cuda"
        assert deviation(solved.cpu(), here.solve(layer, keys, ridge=0.01)) < 1e-9


def test_a_moment_is_factorised_once(collected, monkeypatch):
    own = Moments(collected.matrices, collected.tokens)
    factorised, factorise = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: factorised.append(1) or factorise(matrix))
    keys = torch.ones(WIDTH, 1)
    for _ in range(3):
        own.solve(0, keys)
        own.solve(1, keys)
        own.with_ridge(0.1).solve(0, keys)
    assert len(factorised) == 3
    monkeypatch.setattr(moments, "_FACTOR_BYTES", 2 * 8 * WIDTH**2)
    own.solve(2, keys)
    assert [key[:2] for key in own._factors.entries] == [(0, 0.1), (2, 0.0)]


def test_keys_of_another_width_are_refused(collected):
    for keys in (torch.ones(WIDTH - 1, 1), torch.ones(WIDTH)):
        with pytest.raises(ExperimentError, match=r"keys \(12.*for the moment of layer 2; give them as \(128, n\)"):
            collected.solve(2, keys)
    with pytest.raises(ExperimentError, match="no moment of layer 7, only of 0, 1, 2, 3"):
        collected.solve(7, torch.ones(WIDTH, 1))
    with pytest.raises(ExperimentError, match="the ridge is -1"):
        collected.solve(0, torch.ones(WIDTH, 1), ridge=-1)
    with pytest.raises(ExperimentError, match="the ridge is nan"):
        collected.with_ridge(float("nan"))


def test_too_few_tokens_for_an_inverse(model, tokenizer):
    few = Moments.collect(model, tokenizer, MANY, (1,), WIDTH - 1)
    with pytest.raises(
        ExperimentError,
        match=r"layer 1, over 127 tokens, .*cannot span keys of width 128 \(condition number infinite.*with_ridge",
    ):
        few.solve(1, torch.ones(WIDTH, 1))
    assert torch.isfinite(few.with_ridge(0.01).solve(1, torch.ones(WIDTH, 1))).all()


def test_keys_that_are_never_there(collected):
    silent = collected.matrix(0).clone()
    silent[5], silent[:, 5] = 0, 0
    found = Moments({0: silent}, {0: 10_000})
    with pytest.raises(ExperimentError, match=r"1 of the 128 components of its keys are zero in all of them"):
        found.solve(0, torch.ones(WIDTH, 1))
    assert torch.isfinite(found.with_ridge(0.01).solve(0, torch.ones(WIDTH, 1))).all()


def spread(smallest, dtype=torch.float64, scale=1.0):
    """A moment whose eigenvalues, at unit diagonal, run from 1 to about ``smallest``."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64, generator=generator))[0]
    matrix = axes * torch.logspace(0, float(np.log10(smallest)), 96, dtype=torch.float64) @ axes.T
    matrix = (matrix + matrix.T) / 2
    by = torch.logspace(0, scale, 96, dtype=torch.float64)
    return (by[:, None] * matrix * by).to(dtype)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e12), (torch.float32, 1e8)])
def test_condition(dtype, limit):
    keys = torch.ones(96, 1)
    Moments({3: spread(30 / limit, dtype)}, {3: 1000}).solve(3, keys)
    hopeless = spread(0.1 / limit, torch.float64).to(dtype)
    with pytest.raises(
        ExperimentError, match=r"hardly vary in some directions \(condition number (\S+), at most"
    ) as told:
        Moments({3: hopeless}, {3: 1000}).solve(3, keys)
    number = re.search(r"condition number (\S+),", str(told.value))[1]
    if dtype == torch.float64:
        wide = hopeless / hopeless.diagonal().sqrt() / hopeless.diagonal().sqrt()[:, None]
        true = torch.linalg.cond(wide).item()
        assert 0.3 * true < float(number) < 1.1 * true
    Moments({3: hopeless}, {3: 1000}).with_ridge(1e-4).solve(3, keys)


def test_components_of_any_size_are_solved():
    """Keys of which some components are 10,000 times as large as others."""
    matrix = spread(1e-7, scale=4.0)
    assert torch.linalg.cond(matrix) > 1e12
    keys = torch.logspace(0, 4, 96, dtype=torch.float64)[:, None]
    found = Moments({0: matrix}, {0: 1000}).solve(0, keys)
    assert deviation(matrix @ found, keys) < 1e-6


def test_moments_of_other_shapes_are_refused():
    for matrix in (torch.ones(3, 4), torch.ones(3), torch.ones(3, 3, dtype=torch.float16)):
        with pytest.raises(ExperimentError, match=r"the moment of layer 2 is \(3.* give \(inner, inner\)"):
            Moments({2: matrix}, {2: 10})
    with pytest.raises(ExperimentError, match="layers 2 with token counts of 1"):
        Moments({2: torch.eye(3)}, {1: 10})


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


def test_a_file_gives_back_what_was_saved(collected, tmp_path):
    path = tmp_path / "folder" / "moments.safetensors"
    collected.save(path)
    loaded = Moments.load(path)
    assert (loaded.layers, loaded.tokens, loaded.source) == ((0, 1, 2, 3), collected.tokens, "pairs of facts")
    assert loaded.identity == collected.identity
    assert all(torch.equal(loaded.matrices[layer], collected.matrices[layer]) for layer in loaded.layers)
    assert Moments.load(path, 2).layers == (2,)
    some = Moments.load(path, (3, 1))
    assert some.layers == (1, 3)
    assert torch.equal(some.matrix(3), collected.matrix(3))
    collected.save(path, "float32")
    assert Moments.load(path).matrices[1].dtype == torch.float32
    assert deviation(Moments.load(path).matrix(1), collected.matrix(1)) < 1e-7
    with pytest.raises(ExperimentError, match="cannot be saved in float64; leave dtype out"):
        Moments.load(path).save(path, "float64")
    with pytest.raises(ExperimentError, match="cannot be saved in bfloat16"):
        collected.save(path, "bfloat16")
    assert os.listdir(path.parent) == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_is_written_whole_or_not_at_all(collected, tmp_path, monkeypatch):
    path = tmp_path / "moments"
    collected.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ExperimentError, match=r"no moments can be written to .*moments: disk full"):
        collected.save(path, "float32")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["moments"]


def test_files_that_hold_no_moments(model, tokenizer, collected, tmp_path):
    path = tmp_path / "moments"
    with pytest.raises(ExperimentError, match=r"there is no file of moments .*; check the path"):
        Moments.load(path)
    collected.save(path)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"nothing", b""):
        path.write_bytes(content)
        with pytest.raises(ExperimentError, match=r"is no file of moments, or a damaged one"):
            Moments.load(path)
    path.write_bytes(whole)
    with pytest.raises(ExperimentError, match=r"has no moment of layer 4, only of 0, 1, 2, 3"):
        Moments.load(path, (0, 4))
    path.write_bytes(whole.replace(rb"{\"version\": 1", rb"{\"version\": 2"))
    with pytest.raises(ExperimentError, match=r"has version 2 of its layout, .*update causalcone"):
        Moments.load(path)
    Moments.collect(model, tokenizer, TEXTS, (0,), 40, resume=tmp_path / "sums")
    with pytest.raises(ExperimentError, match="is a safetensors file, but holds no moments"):
        Moments.load(tmp_path / "sums")
    collected.save(path)
    with pytest.raises(ExperimentError, match="holds no collection under way"):
        Moments.collect(model, tokenizer, TEXTS, (0,), 40, resume=path)


def publish(path, keys, dtype=np.float32, **more):
    """Write a file as ROME's are: the sum of k k^T and the count, each under the statistic's name, and the number of
    texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        **{
            "mom2.constructor": "util.runningstats.SecondMoment()",
            "mom2.count": len(keys),
            "mom2.mom2": (keys.T @ keys).numpy().astype(dtype),
            "sample_size": 100000,
            **more,
        },
    )


def random_keys(tokens, width):
    return torch.randn(tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


NAMES = {
    "transformer.h.17.mlp.c_proj_float32_mom2_100000.npz": 17,
    "transformer.h.3.mlp.fc_out_float32_mom2_100000.npz": 3,
    "gpt_neox.layers.15.mlp.dense_4h_to_h_float32_mom2_100000.npz": 15,
    "model.layers.6.mlp.down_proj_float32_mom2_t1000_100000.npz": 6,
}


@pytest.mark.parametrize("name", NAMES)
def test_published_file(name, tmp_path):
    keys = random_keys(500, 12)
    path = tmp_path / "gpt2-xl" / "wikipedia_stats" / name
    publish(path, keys)
    found = Moments.load(path)
    layer = NAMES[name]
    assert (found.layers, found.tokens) == ((layer,), {layer: 500})
    assert (found.source, found.identity) == ("gpt2-xl/wikipedia_stats", None)
    assert found.matrices[layer].dtype == torch.float32
    assert deviation(found.matrix(layer), keys.T @ keys / 500) < 2e-7
    path.rename(tmp_path / "some.npz")
    with pytest.raises(ExperimentError, match=r"some.npz does not tell its layer; give it as layers=17"):
        Moments.load(tmp_path / "some.npz")
    assert Moments.load(tmp_path / "some.npz", 5).layers == (5,)
    assert Moments.load({7: tmp_path / "some.npz"}).layers == (7,)


def test_published_folder(tmp_path):
    keys = {layer: random_keys(100 + layer, 9) for layer in (0, 2, 11)}
    for layer, own in keys.items():
        publish(tmp_path / f"transformer.h.{layer}.mlp.c_proj_float64_mom2.npz", own, np.float64)
    publish(tmp_path / "lm_head_float32_mom2_100000.npz", keys[0])
    found = Moments.load(tmp_path)
    assert found.tokens == {0: 100, 2: 102, 11: 111}
    for layer, own in keys.items():
        assert deviation(found.matrix(layer), own.T @ own / len(own)) < 1e-14
    assert Moments.load(tmp_path, (2, 11)).layers == (2, 11)
    with pytest.raises(ExperimentError, match="has no moment of layer 1, only of 0, 2, 11"):
        Moments.load(tmp_path, 1)
    publish(tmp_path / "transformer.h.2.mlp.c_proj_float32_mom2_100000.npz", keys[2])
    with pytest.raises(
        ExperimentError, match=r"two moments of layer 2, .*float32_mom2_100000.npz and .*float64_mom2.npz"
    ):
        Moments.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExperimentError, match="has no published moments"):
        Moments.load(tmp_path / "empty")


def test_published_moments_are_checked_for_width(model, tmp_path):
    def of(layer, width):
        publish(tmp_path / f"{layer}.npz", random_keys(300, width))
        return Moments.load({layer: tmp_path / f"{layer}.npz"})

    of(2, WIDTH).check(model, (2,))
    with pytest.raises(ExperimentError, match="the keys of layer 2 have a width of 128, not 64"):
        of(2, 64).check(model, (2,))
    with pytest.raises(ExperimentError, match="it has no layer 17"):
        of(17, WIDTH).check(model, (17,))
    with pytest.raises(ExperimentError, match="no moment of layer 3, only of 2"):
        of(2, WIDTH).check(model, (2, 3))


def test_damaged_published_files(tmp_path):
    path, keys = tmp_path / "transformer.h.0.mlp.c_proj_float32_mom2_100000.npz", torch.ones(20, 4)
    with pytest.raises(ExperimentError, match="there is no file of moments"):
        Moments.load(path)
    publish(path, keys)
    whole = path.read_bytes()
    for content in (whole[:-30], b"nothing", b"", whole.replace(b"mom2.count", b"mom2.cound")):
        path.write_bytes(content)
        with pytest.raises(ExperimentError, match="is no published second moment, or a damaged one"):
            Moments.load(path)
    for wrong in ({"mom2.count": 0}, {"mom2.mom2": np.ones((3, 4))}, {"mom2.mom2": np.full((4, 4), np.nan)}):
        publish(path, keys, **wrong)
        with pytest.raises(ExperimentError, match="get it anew"):
            Moments.load(path)
    publish(path, keys, **{"mom2.mom2": np.array([[{}]], dtype=object)})
    with pytest.raises(ExperimentError, match="is no published second moment"):
        Moments.load(path)
