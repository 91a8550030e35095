"""``causalcone export`` and ``edit --save``: what is written is the edited model, and what it loses by that is told."""

import json
import re

import peft
import pytest
import torch
from helpers.edit_command import FAST, arguments, read, run_json, write_inputs
from helpers.edited_models import logits
from helpers.editing_cases import FULL
from transformers import AutoModelForCausalLM, AutoTokenizer

import causalcone as cc
from causalcone.engine.edit.deltas.delta import Delta, load_delta

FEW = {"limit": 2, "layers": "1"}
"""Two facts at one layer."""


@pytest.fixture(scope="module")
def user(folder):
    """What a user has."""
    return write_inputs(folder)


@pytest.fixture
def model(user):
    return AutoModelForCausalLM.from_pretrained(user / "model", dtype="auto")


@pytest.fixture
def kept(user, tmp_path, run):
    """The folder of edits by two methods of low rank, with their changes."""
    out = tmp_path / "kept"
    assert run(*arguments(user, out, "--method", "memit:2", "--keep-deltas", *FAST, **FEW))[0] == 0
    return out


@pytest.fixture
def export(user, tmp_path, run):
    """Runs the command on the model; the exit code, what it printed, and the folder."""

    def export(edits, *more, name="written"):
        given = ("--model", user / "model", "--edits", edits, "--out", tmp_path / name)
        code, printed, error = run("export", *given, *more)
        return code, printed + error, tmp_path / name

    return export


def delta_of(kept, edit_id):
    """Found by what the files say of themselves."""
    files = (load_delta(path) for path in (kept / "deltas").rglob("*.safetensors"))
    (delta,) = (delta for delta, described in files if described["edit_id"] == edit_id)
    return delta


def edited_logits(model, delta):
    with cc.applied(model, delta):
        return logits(model)


def probability(model, tokenizer, prompt, answer):
    """That of an answer after a prompt, by the model alone."""
    ids, target = (tokenizer(text, return_tensors="pt").input_ids for text in (prompt, f" {answer}"))
    with torch.no_grad():
        log_p = model(torch.cat([ids, target], 1)).logits[0].double().log_softmax(-1)
    rows = range(ids.shape[1] - 1, ids.shape[1] + target.shape[1] - 1)
    return sum(log_p[row, token] for row, token in zip(rows, target[0], strict=True)).exp().item()


def test_one_edit_as_a_model_and_as_an_adapter(kept, export, model):
    for name in (edit_ids := read(kept)[0]["edit_id"].to_list()):
        assert name.split("/")[2] in ("rome-1", "memit-2")
    wanted = edited_logits(model, delta_of(kept, edit_ids[-1]))
    code, said, folder = export(kept, "--edit", edit_ids[-1])
    assert (code, edit_ids[-1] in said) == (0, True)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    torch.testing.assert_close(logits(whole), wanted, rtol=1e-5, atol=1e-5)
    code, _, folder = export(kept, "--edit", edit_ids[-1], "--format", "peft", name="adapter")
    assert code == 0
    with_adapter = peft.PeftModel.from_pretrained(model, folder)
    torch.testing.assert_close(logits(with_adapter), wanted, rtol=1e-5, atol=1e-5)
    record = json.loads((folder / "causalcone.json").read_text())
    assert (record["edits"], record["format"], record["relative_error"]) == ([edit_ids[-1]], "peft", 0)
    assert AutoTokenizer.from_pretrained(folder)("Bo").input_ids


def test_all_edits_are_the_sum_of_their_changes(kept, export, model):
    edit_ids = read(kept)[0]["edit_id"].to_list()
    total = Delta({})
    for name in edit_ids:
        total += delta_of(kept, name)
    code, said, folder = export(kept, "--edit", "all", "--format", "peft")
    assert code == 0, said
    assert f"{len(edit_ids)} edits as peft" in said
    wanted = edited_logits(model, total)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(model, folder)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["model", "peft"])
def test_what_rounding_takes_is_told(kept, export, model, format):
    """Both probabilities are those that the unrounded and the written model give by themselves."""
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    row = next(row for row in read(kept)[0].iter_rows(named=True) if row["method"] == "rome")
    fact = next(fact for fact in FULL if fact.id == row["fact_id"])
    code, said, folder = export(kept, "--edit", row["edit_id"], "--dtype", "bfloat16", "--format", format)
    assert code == 0, said
    (score,) = json.loads((folder / "causalcone.json").read_text())["scores"]
    with cc.applied(model, delta_of(kept, row["edit_id"])):
        before = probability(model, tokenizer, fact.text, fact.target_new)
    if format == "model":
        written = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert written.dtype == torch.bfloat16
    else:
        written = peft.PeftModel.from_pretrained(model.to(torch.bfloat16), folder)
    after = probability(written.float(), tokenizer, fact.text, fact.target_new)
    assert score["p_before"] == pytest.approx(before, rel=1e-4, abs=0)
    assert score["p_after"] == pytest.approx(after, rel=1e-4, abs=0)
    assert score["p_after"] != pytest.approx(before, rel=2e-4, abs=0)
    shown = re.search(r"p of the target: (\S+) before, (\S+) as written", said)
    assert [float(shown[1]), float(shown[2])] == [float(f"{score[name]:.3g}") for name in ("p_before", "p_after")]


def test_a_rank_for_a_server(user, tmp_path, run, export):
    """Joint edits share a change of a rank for each of them; what a smaller one leaves out is told, and scored."""
    out = tmp_path / "mass"
    assert run(*arguments(user, out, "--keep-deltas", *FAST, method="memit_joint:2", **FEW | {"limit": 4}))[0] == 0
    code, said, folder = export(out, "--edit", "all", "--format", "peft", "--max-rank", "2")
    assert code == 0, said
    assert "more than rank 2" in said
    assert "mean p of 4 targets" in said
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    assert json.loads((folder / "causalcone.json").read_text())["relative_error"] > 1e-3


def test_a_delta_file_is_enough(kept, export, model):
    path = sorted((kept / "deltas").rglob("*.safetensors"))[0]
    code, said, folder = export(path, "--dtype", "float16")
    assert code == 0, said
    assert "p of the target" in said
    written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = edited_logits(model, load_delta(path)[0])
    torch.testing.assert_close(logits(written), wanted, rtol=0.05, atol=0.05)
    assert export(path, "--edit", "9/error_injection/rome-1/1", name="more")[1].endswith("or give a result folder\n")


def test_what_cannot_be_exported(user, kept, tmp_path, run, export):
    bare, dense = tmp_path / "bare", tmp_path / "dense"
    assert run(*arguments(user, bare, *FAST, limit=1, layers="1"))[0] == 0
    assert run(*arguments(user, dense, "--keep-deltas", *FAST, limit=1, layers="1", method="finetune"))[0] == 0
    edit_ids = read(kept)[0]["edit_id"].to_list()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    for edits, more, name, message in [
        (kept, ["--edit", "nothing"], "new", f"holds no finished edit 'nothing'; it has {edit_ids[0]}, {edit_ids[1]}"),
        (kept, [], "new", f"--edit is missing: give one of {edit_ids[0]}"),
        (bare, [], "new", "has not kept the changes of its edits; edit again with --keep-deltas"),
        (dense, ["--format", "peft"], "new", "layer 1 is dense"),
        (tmp_path / "nowhere", [], "new", "neither a result folder of causalcone edit nor a delta file"),
        (user / "moments.safetensors", [], "new", "holds no delta"),
        (kept, ["--edit", "all"], "taken", "taken exists already; give a new folder"),
        (kept, ["--edit", "all", "--format", "lora"], "new", "--format is 'lora'; choose from model, peft"),
        (kept, ["--edit", "all", "--dtype", "int8"], "new", "dtype 'int8' is not supported"),
        (kept, ["--edit", "all", "--max-rank", "4"], "new", "a whole model has no rank"),
    ]:
        code, said, folder = export(edits, *more, name=name)
        assert (code, message in said) == (2, True), said
        assert [path.name for path in folder.glob("*")] == (["mine.txt"] if name == "taken" else [])


def test_edit_saves_what_it_made(user, tmp_path, run, model):
    prompt = ("--prompt", "The mother tongue of Danielle Darrieux is", "--subject", "Danielle Darrieux")
    answers = ("--answer", "French", "--new", "Latin", "--layer", 1, "--moments", user / "moments.safetensors")
    given = ("edit", "--model", user / "model", *prompt, *answers, "--contexts", user / "contexts.json")
    code, said, error = run(*given, "--set", "steps=4", "--save", tmp_path / "edited")
    assert code == 0, error
    assert "prompt/error_injection/rome-1/1 as model in float32" in said
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]
    tokenizer = AutoTokenizer.from_pretrained(user / "model")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype="auto")
    p = [probability(each, tokenizer, prompt[1], "Latin") for each in (model, written)]
    shown = [float(row[1]) for row in re.findall(r"│ (unedited|1) +│ ([\d.e-]+)", said)]
    assert p[1] > p[0]
    assert shown == pytest.approx(p, rel=0.01)
    code, _, error = run(*given, "--set", "steps=4", "--save", tmp_path / "edited")
    assert (code, "edited exists already" in error) == (2, True)


def test_edit_saves_a_joint_edit_in_bfloat16(user, tmp_path, run):
    out, folder = tmp_path / "out", tmp_path / "adapter"
    saving = ["--dtype", "bfloat16", "--save", folder, "--format", "peft"]
    code, said, error = run(*arguments(user, out, "--set", "steps=2", *saving, method="memit_joint:2", **FEW))
    assert code == 0, error
    assert "mean p of 2 targets" in said
    saved = run_json(out)["results"]["saved"]
    assert saved == json.loads((folder / "causalcone.json").read_text())
    assert (saved["dtype"], len(saved["edits"]), len(saved["scores"])) == ("bfloat16", 2, 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layers", "1,2"], "--save writes one edited model, and 12 are made; give one --prompt"),
        (["--limit", "1", "--layers", "1", "--method", "memit:2"], "and 2 are made"),
        (["--limit", "1", "--layers", "1", "--format", "lora"], "--format is 'lora'; choose from model, peft"),
        (["--layers", "1", "--sequential"], "--sequential makes a sequence; leave out one of the two"),
    ],
)
def test_what_edit_does_not_save(user, tmp_path, run, more, message):
    code, _, error = run(*arguments(user, tmp_path / "out", *FAST, *more, "--save", tmp_path / "saved"))
    assert (code, message in error) == (2, True), error
    assert not (tmp_path / "out").exists()
