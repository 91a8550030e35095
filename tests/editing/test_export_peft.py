"""A low-rank change as an adapter: PEFT puts it on the unedited model, which then computes what the edited one does."""

import copy
import json
import warnings

import peft
import pytest
import safetensors
import torch
from helpers.edited_models import bits, dense, down, logits, low_rank, seen, sizes
from helpers.families import FAMILIES
from helpers.models import gpt2

import causalcone as cc
from causalcone.engine.edit.deltas.delta import Delta, Dense, LowRank
from causalcone.engine.edit.deltas.peft import RankCut
from causalcone.engine.errors import ExperimentError


@pytest.fixture
def own():
    """A float64 GPT-2 that a test may change."""
    return gpt2(3)


def loaded(model, folder):
    """A copy of the model with an adapter; PEFT has nothing to complain of in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_peft_computes_what_the_edited_model_does(tmp_path, tokenizer, family):
    """Layers of different ranks have one, and no other module is touched."""
    model = FAMILIES[family](3, dtype=torch.float32)
    before, delta = bits(model), Delta({0: low_rank(model, rank=1), 2: low_rank(model, rank=3, seed=5)})
    cc.export(model, delta, tmp_path / "adapter", tokenizer, format="peft")
    assert bits(model) == before
    with cc.applied(model, delta):
        wanted = logits(model)
    adapted = loaded(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - logits(model)).abs().max() > 1e-3
    names = {module: name for name, module in model.named_modules()}
    changed = [names[down(model, layer)] for layer in (0, 2)]
    assert adapted.base_model.targeted_module_names == changed
    assert (tmp_path / "adapter" / "tokenizer.json").exists()
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), logits(model))
    torch.testing.assert_close(logits(adapted.merge_and_unload()), wanted, rtol=1e-5, atol=1e-5)


def test_what_the_files_say(tmp_path, own):
    own.config._name_or_path = "somebody/their-gpt2"
    cc.export(own, Delta({1: low_rank(own, rank=2)}), tmp_path / "adapter", format="peft")
    said = config(tmp_path / "adapter")
    assert (said["r"], said["lora_alpha"], said["fan_in_fan_out"]) == (2, 2, True)
    assert said["base_model_name_or_path"] == "somebody/their-gpt2"
    assert said["target_modules"] == ["transformer.h.1.mlp.c_proj"]
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    modes = {path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}
    assert len(modes) == 1
    with safetensors.safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "causalcone.relative_error": "0"}


def test_a_rank_is_cut_to_the_nearest_change(tmp_path, own):
    """As the singular values of the whole matrices say; a layer of that rank stays as it is."""
    large, small = low_rank(own, rank=9), low_rank(own, rank=2, seed=4)
    delta = Delta({0: large, 2: small})
    with pytest.warns(RankCut, match=r"of more than rank 4: .* give a larger max_rank") as told:
        cc.export(own, delta, tmp_path / "adapter", format="peft", max_rank=4)
    before, values, after = torch.linalg.svd(large.rows(slice(None)), full_matrices=False)
    assert told[0].message.error == pytest.approx(values[4:].norm().item() / delta.norm, rel=1e-9)
    assert told[0].filename == __file__
    nearest = Dense(before[:, :4] * values[:4] @ after[:4])
    with cc.applied(own, Delta({0: nearest, 2: small})):
        wanted = logits(own)
    torch.testing.assert_close(logits(loaded(own, tmp_path / "adapter")), wanted, rtol=1e-9, atol=1e-9)
    assert config(tmp_path / "adapter")["r"] == 4
    with safetensors.safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        assert float(file.metadata()["causalcone.relative_error"]) == pytest.approx(told[0].message.error, rel=1e-5)


def test_a_rank_that_is_allowed_is_not_cut(tmp_path, own):
    delta = Delta({0: low_rank(own, rank=4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cc.export(own, delta, tmp_path / "adapter", format="peft", max_rank=4)
    with cc.applied(own, delta):
        wanted = logits(own)
    torch.testing.assert_close(logits(loaded(own, tmp_path / "adapter")), wanted, rtol=1e-9, atol=1e-9)


def test_a_change_of_more_than_full_rank_is_cut_too(tmp_path, own):
    """A sum of more edits than the weights have rows is one of as many singular values as there are rows."""
    hidden, _ = sizes(own)
    delta = Delta({0: low_rank(own, rank=hidden + 5)})
    with pytest.warns(RankCut) as told:
        cc.export(own, delta, tmp_path / "adapter", format="peft", max_rank=hidden)
    assert told[0].message.error < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_stay_in_the_range_of_narrow_dtypes(tmp_path, own, dtype):
    """Where one is as small as solves by moments make it, and the other as large."""
    change = low_rank(own)
    scales = torch.tensor([1e-9, 1e6], dtype=torch.float64)
    delta = Delta({1: LowRank(change.left / scales, change.right * scales)})
    model = own.to(dtype)
    cc.export(model, delta, tmp_path / "adapter", format="peft")
    with safetensors.safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in sorted(file.keys())]
    assert {tensor.dtype for tensor in tensors} == {dtype}
    written = tensors[1].double() @ tensors[0].double()
    wanted = change.rows(slice(None))
    assert (written - wanted).norm() < 4 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("dense", {}, r"layer 1 is dense .* export the whole model"),
        ("nothing", {}, "the delta changes no layer; give one that does"),
        ("nan", {}, "layer 1 holds NaN or infinity; make it anew"),
        ("other", {}, r"layer 1 is for a weight of \(3, 5\)"),
        ("low rank", {"max_rank": 0}, "max_rank is 0; give a whole number, at least one, such as 64"),
        ("low rank", {"max_rank": 1.5}, r"max_rank is 1\.5; give a whole number"),
        ("low rank", {"format": "model", "max_rank": 2}, "a whole model has no rank; leave out max_rank"),
        ("low rank", {"format": "lora"}, "format is 'lora'; choose from model, peft"),
        ("taken", {}, "adapter exists already; give a new folder"),
    ],
)
def test_what_no_adapter_is_written_of(tmp_path, own, change, options, message):
    few = low_rank(own)
    changes = {
        "dense": {1: dense(own)},
        "nothing": {},
        "nan": {1: LowRank(few.left / 0, few.right)},
        "other": {1: LowRank(torch.ones(3, 1), torch.ones(5, 1))},
    }
    if change == "taken":
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExperimentError, match=message):
        cc.export(own, Delta(changes.get(change, {1: few})), tmp_path / "adapter", **{"format": "peft", **options})
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_that_cannot_be_finished_leaves_nothing(tmp_path, own):
    class Broken:
        def save_pretrained(self, folder):
            assert len(list(folder.iterdir())) == 2
            raise ZeroDivisionError

    weights = seen(own, 0).clone()
    with pytest.raises(ZeroDivisionError):
        cc.export(own, Delta({0: low_rank(own)}), tmp_path / "adapter", Broken(), format="peft")
    assert not list(tmp_path.iterdir())
    assert torch.equal(seen(own, 0), weights)


@pytest.mark.parametrize(("family", "names"), [("gpt2", ("up",)), ("llama", ("up", "gate"))])
def test_gate_and_up_are_modules_like_any_other(tmp_path, family, names):
    model = FAMILIES[family](3, dtype=torch.float32)
    turned = LowRank(low_rank(model).right, low_rank(model).left)
    delta = Delta({0: low_rank(model, rank=1), **{(1, name): turned for name in names}})
    cc.export(model, delta, tmp_path / "adapter", format="peft")
    with cc.applied(model, delta):
        wanted = logits(model)
    torch.testing.assert_close(logits(loaded(model, tmp_path / "adapter")), wanted, rtol=1e-5, atol=1e-5)


def test_one_half_of_a_module_is_no_adapter(tmp_path):
    model = FAMILIES["phi3"](2)
    delta = Delta({(1, "gate"): LowRank(low_rank(model).right, low_rank(model).left)})
    with pytest.raises(ExperimentError, match=r"gate_up_proj holds 2 projections, .* \(format 'model'\)"):
        cc.export(model, delta, tmp_path / "adapter", format="peft")
