"""Files of second moments: our own, and those that were published with ROME."""

import os

import numpy as np
import pytest
import torch
from helpers.collected_moments import TEXTS, WIDTH, deviation

from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.errors import ExperimentError


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
    with pytest.raises(ExperimentError, match=r"there is no moments file .*; check the path"):
        Moments.load(path)
    collected.save(path)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"nothing", b""):
        path.write_bytes(content)
        with pytest.raises(ExperimentError, match=r"is not a moments file, or is damaged"):
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
    with pytest.raises(ExperimentError, match="holds no partial sums"):
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
    with pytest.raises(ExperimentError, match="there is no moments file"):
        Moments.load(path)
    publish(path, keys)
    whole = path.read_bytes()
    for content in (whole[:-30], b"nothing", b"", whole.replace(b"mom2.count", b"mom2.cound")):
        path.write_bytes(content)
        with pytest.raises(ExperimentError, match="is not a published second moment, or is damaged"):
            Moments.load(path)
    for wrong in ({"mom2.count": 0}, {"mom2.mom2": np.ones((3, 4))}, {"mom2.mom2": np.full((4, 4), np.nan)}):
        publish(path, keys, **wrong)
        with pytest.raises(ExperimentError, match="get it anew"):
            Moments.load(path)
    publish(path, keys, **{"mom2.mom2": np.array([[{}]], dtype=object)})
    with pytest.raises(ExperimentError, match="is not a published second moment"):
        Moments.load(path)
