"""A delta survives a file, and an edited model a folder."""

import contextlib
import json
import os

import pytest
import safetensors.torch
import torch
from helpers.edited_models import bits, dense, down, logits, low_rank, normal, sizes
from helpers.families import FAMILIES
from helpers.models import gpt2
from transformers import AutoModelForCausalLM, AutoTokenizer

from causalcone.engine.edit.deltas.apply import applied, export
from causalcone.engine.edit.deltas.delta import Delta, Dense, LowRank, load_delta
from causalcone.engine.errors import ExperimentError

pytestmark = pytest.mark.filterwarnings("error::causalcone.engine.edit.deltas.apply.RoundedAway")


@pytest.fixture
def own():
    """A float64 GPT-2 that a test may change."""
    return gpt2(3)


# --- files ---


METADATA = {"edit_id": "7", "model": "gpt2 \N{SNOWMAN}", "hparams": json.dumps({"lr": 0.5}), "": ""}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_file_gives_back_every_bit(tmp_path, own, dtype):
    both = dense(own, dtype=dtype)
    few = low_rank(own, dtype=dtype)
    few.left.requires_grad_(True)
    stacked = normal(2, *sizes(own), dtype=dtype)
    shared = LowRank(both.weight[:, 3:5], few.right)
    delta = Delta({11: both, 2: few, 3: shared, 4: Dense(stacked[1]), 0: Dense(stacked[0]), 5: low_rank(own, rank=0)})
    path = tmp_path / "made on the way" / "delta.safetensors"
    delta.save(path, METADATA)
    loaded, metadata = load_delta(path)
    assert metadata == METADATA
    assert loaded.layers == delta.layers == (0, 2, 3, 4, 5, 11)
    for layer, change in delta.changes.items():
        assert type(loaded.changes[layer]) is type(change)
        for name, tensor in vars(change).items():
            found = getattr(loaded.changes[layer], name)
            assert (found is None) == (tensor is None)
            if tensor is not None:
                assert found.dtype == tensor.dtype
                assert found.tolist() == tensor.tolist()
    assert Delta.load(str(path)).norm == delta.norm

    loaded.save(path)  # over the file that its own tensors came from
    assert load_delta(path)[1] == {}
    assert Delta.load(path).norm == delta.norm
    assert [file.name for file in path.parent.iterdir()] == ["delta.safetensors"]


def test_a_loaded_delta_edits_as_the_saved_one(tmp_path, own):
    delta = Delta({0: low_rank(own), 2: dense(own)})
    delta.save(tmp_path / "delta.safetensors")
    with applied(own, delta):
        edited = bits(own)
    with applied(own, Delta.load(tmp_path / "delta.safetensors")):
        assert bits(own) == edited


def test_the_file_is_there_whole_or_as_it_was(tmp_path, own, monkeypatch):
    path = tmp_path / "delta.safetensors"
    Delta({0: low_rank(own)}).save(path, {"edit_id": "first"})
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").unlink()

    os.link(path, tmp_path / "as opened before")
    before = path.read_bytes()
    Delta({0: dense(own)}).save(path, {"edit_id": "second"})
    assert (tmp_path / "as opened before").read_bytes() == before != path.read_bytes()
    (tmp_path / "as opened before").unlink()

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExperimentError, match=r"delta\.safetensors.*no space left"):
        Delta({1: dense(own)}).save(path)
    assert load_delta(path)[1] == {"edit_id": "second"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("metadata", "match"),
    [({"steps": 5}, "'steps' is 5; give strings"), ({3: "x"}, "3"), ({"causalcone.delta": "x"}, "another name")],
)
def test_metadata_are_strings(tmp_path, own, metadata, match):
    with pytest.raises(ExperimentError, match=match):
        Delta({0: low_rank(own)}).save(tmp_path / "delta.safetensors", metadata)
    assert not list(tmp_path.iterdir())


def test_what_is_no_delta_file_is_refused_by_name(tmp_path):
    with pytest.raises(ExperimentError, match=r"no delta file .*missing\.safetensors"):
        Delta.load(tmp_path / "missing.safetensors")
    with pytest.raises(ExperimentError, match="no delta file"):
        Delta.load(tmp_path)
    path = tmp_path / "file"
    for content in (b"", b"{}", b"text " * 100, bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(ExperimentError, match=r"file is not a delta file, or is damaged .* Delta\.save"):
            Delta.load(path)
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"layers.0.left": torch.zeros(2, 1)}, path, metadata)
        with pytest.raises(ExperimentError, match="holds no delta"):
            Delta.load(path)
    for layout in ("", "[]", "{}", '{"version": 1}', '{"version": "1"}', '{"version": 1, "crc32": {}, "layers": {}}'):
        safetensors.torch.save_file({"layers.0.left": torch.zeros(2, 1)}, path, {"causalcone.delta": layout})
        with pytest.raises(ExperimentError, match="not a delta file, or is damaged"):
            Delta.load(path)
    safetensors.torch.save_file({"x": torch.zeros(2, 1)}, path, {"causalcone.delta": '{"version": 3}'})
    with pytest.raises(ExperimentError, match=r"has version 3 .* update causalcone"):
        Delta.load(path)


def test_damage_anywhere_is_an_error_with_the_files_name(tmp_path):
    path = tmp_path / "delta.safetensors"
    Delta({1: LowRank(normal(4, 1), normal(6, 1)), 2: Dense(normal(4, 6), normal(4))}).save(path, {"edit_id": "7"})
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for end in range(0, len(content), 7):
        path.write_bytes(content[:end])
        with pytest.raises(ExperimentError, match=r"delta\.safetensors"):
            Delta.load(path)
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        if place < begin:  # a letter of an own metadatum may change unseen
            with contextlib.suppress(ExperimentError):
                Delta.load(path)
        else:
            with pytest.raises(ExperimentError, match=r"delta\.safetensors is not a delta file, or is damaged"):
                Delta.load(path)


# --- models of their own ---


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_an_exported_model_is_the_edited_one(tmp_path, tokenizer, family):
    model = FAMILIES[family](2, dtype=torch.float32)
    delta = Delta({0: low_rank(model), 1: dense(model, bias=down(model, 1).bias is not None)})
    before, config = bits(model), model.config.to_dict()
    (tmp_path / "edited").mkdir()
    export(model, delta, tmp_path / "edited", tokenizer)
    assert bits(model) == before
    assert model.config.to_dict() == config
    with applied(model, delta):
        wanted, weights = logits(model), bits(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype="auto")
    assert bits(loaded) == weights
    torch.testing.assert_close(logits(loaded), wanted)
    assert (wanted - logits(model)).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "edited")("Ann Lee").input_ids == tokenizer("Ann Lee").input_ids
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]


def test_an_export_that_fails_leaves_nothing(tmp_path, own):
    before = bits(own)

    class Broken:
        def save_pretrained(self, folder):
            assert any(folder.iterdir())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        export(own, Delta({0: low_rank(own)}), tmp_path / "edited", Broken())
    assert bits(own) == before
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ExperimentError, match="mine exists already; give a new folder"):
        export(own, Delta({0: low_rank(own)}), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(ExperimentError, match=r"edited model can be written to .*thesis"):
        export(own, Delta({0: low_rank(own)}), tmp_path / "mine" / "thesis.tex" / "edited")
    with pytest.raises(ExperimentError, match=r"delta can be written to .*thesis"):
        Delta({0: low_rank(own)}).save(tmp_path / "mine" / "thesis.tex" / "delta.safetensors")
    assert bits(own) == before
