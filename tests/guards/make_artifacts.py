"""Writes ``artifacts/``, ``snapshots/`` and ``documented_names.json``, which the tests beside it compare code with.

    python tests/guards/make_artifacts.py          # all of it
    python tests/guards/make_artifacts.py --api    # names, signatures, commands and help alone

Run it only where a file, a name or a number is to change: what is there was written by the code as it was before, and
says that nothing changed since. The model is a GPT-2 of three layers (width 16, two heads, keys of width 32) whose
parameters come from ``torch.Generator().manual_seed(11)``; texts come from ``random.Random(5)``, contexts and changes
of weights from the editor's seed 3, the moments from all texts, the half-collected ones from the first pass over three
times these, and the half-done sweep was interrupted before its third scoring of edits. Times of day and seconds are
written as fixed values, so that running it again on the same machine gives the same bytes.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import torch
import typer
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import causalcone as cc

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parent))
import test_earlier_files as files
import test_earlier_sweeps as sweeps
import test_public_names as public
from helpers import guards

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
BOS = "<|endoftext|>"
WORDS = (
    "In the city",
    "of Rome",
    "they speak",
    "Latin",
    "Ann Lee plays",
    "the sport of",
    "tennis",
    "golf",
    "Bo",
    "French",
)

FACTS = [
    cc.Fact(
        name, prompt, subject, true, new,
        paraphrase_prompts=(f"So {prompt.replace('{}', subject)}", "It is known that"),
        neighborhood_prompts=("Bo plays the sport of", "Rome is"),
        attribute_prompts=("They speak",),
    )
    for name, prompt, subject, true, new in (
        ("start", "{} plays the sport of", "Ann Lee", "tennis", "golf"),
        ("middle", "The tongue of {} is", "Darrieux", "French", "Latin"),
        ("end", "A famous player is {}", "Bo", "golf", "tennis"),
        ("one token", "In the city of {} they speak", "Rome", "Latin", "French"),
    )
]  # fmt: skip

SWEEP = """\
model = "model"
facts = "facts.jsonl"
contexts = "contexts.json"
moments.file = "moments.safetensors"
dtype = "float64"
filter.completes = false
filter.erasable = 0.0
noise = { sigma = 0.4, samples = 2 }
units = { facts = 2, edits = 4 }

[trace]
states = ["hidden:1", "mlp:3"]

[sever]
parts = ["mlp"]

[zero]
states = ["mlp:3"]

[gradients]
kinds = ["mlp"]
steps = 2
facts = 2

[edit]
problems = ["error_injection"]
methods = ["rome", "finetune:1"]
layers = [0, 2]
set = ["steps=20"]
accuracy = true
"""
TUNE = (
    "tune --model model --facts facts.jsonl --method finetune:1 --method rome --moments moments.safetensors "
    "--contexts contexts.json --layer 1 --grid finetune.norm_constraint=1e-2,1e-3 --grid rome.kl_factor=0.5,1 "
    "--give-up 1 --no-filter --set steps=20 --dtype float64 --limit 2 --quiet --out tuned"
)


def make_model(folder: Path) -> None:
    """Model and tokenizer."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=[BOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=BOS)
    shape = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64, "n_inner": 32}
    model = GPT2LMHeadModel(GPT2Config(**shape, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                parameter += 0.3 * noise
            elif max(parameter.shape) > 48:
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[0] ** 0.5)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_files() -> None:
    """All artefacts but ``expected.json``, in the current folder."""
    make_model(Path("model"))
    drawn = random.Random(5)
    lines = [" ".join(drawn.choices(WORDS, k=12)) for _ in range(120)]
    Path("texts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    cc.save_facts(FACTS, "facts.jsonl")
    Path("sweep.toml").write_text(SWEEP, encoding="utf-8")

    model, tokenizer = files.loaded(Path())
    moments = cc.Moments.collect(model, tokenizer, lines, source="lines of ten words", dtype="float64")
    moments.save("moments.safetensors")
    half_collected(model, tokenizer, lines)

    editor = cc.Editor(model, tokenizer, moments, seed=3)
    Path("contexts.json").write_text(json.dumps(asdict(editor.contexts), indent=1) + "\n", encoding="utf-8")
    requests = editor.requests(FACTS[:1], problem="error_injection", filtered=False)
    (low_rank,) = editor.rome(requests, (1,), cc.RomeHparams(steps=20))
    (dense,) = editor.finetune(requests, (1,), 1, cc.FinetuneHparams(steps=20, norm_constraint=1e-2))
    for name, edit in (("low_rank", low_rank), ("dense", dense)):
        assert edit.delta is not None
        edit.delta.save(f"{name}.safetensors")

    for name, command in files.COMMANDS.items():
        guards.carried_out(*command.split(), name)
    guards.carried_out(*TUNE.split())
    shutil.copy("tuned/preset.toml", "preset.toml")
    shutil.rmtree("tuned")


def half_collected(model: Any, tokenizer: Any, lines: list[str]) -> None:
    """A collection that is interrupted after its first pass."""

    def stop(done: int, wanted: int | None) -> None:
        raise KeyboardInterrupt

    try:
        cc.Moments.collect(
            model, tokenizer, lines * 3, files.MOMENT_LAYERS, "all", source="lines", dtype="float64",
            resume="half.safetensors.partial", progress=stop,
        )  # fmt: skip
    except KeyboardInterrupt:
        return
    raise AssertionError("the texts are too few for two passes")


def half_swept() -> dict[str, Any]:
    """A sweep that is interrupted, and what is expected of one that goes on; in the current folder."""
    with sweeps.interrupted(2) as calls:
        code, _, error = guards.run(*sweeps.SWEEP, "half_sweep", "--quiet")
    assert code == 130, error
    done = len(calls)
    with sweeps.interrupted(10**9) as calls:
        guards.carried_out(*sweeps.SWEEP, "study", "--quiet")
    parts = {name: len(list(Path(name).rglob("part-*.parquet"))) for name in ("half_sweep", "study")}
    return {
        "parts done": parts["half_sweep"],
        "parts": parts["study"],
        "evaluations done": done,
        "evaluations": len(calls),
        "tables": guards.digests(Path("study")),
        "run": guards.kept_run(Path("study")),
        "facts": guards.digest(pl.read_parquet("study/facts.parquet")),
        "files": sorted(path.relative_to("study").as_posix() for path in Path("study").rglob("*.parquet")),
    }


def numbers() -> dict[str, Any]:
    """What is expected of the artefacts, which lie in their place by now."""
    from causalcone.runners.presets import load_hparams

    model, tokenizer = files.loaded()
    whole = cc.Moments.collect(
        model, tokenizer, files.texts() * 3, files.MOMENT_LAYERS, "all", source="lines", dtype="float64"
    )
    folder = guards.ARTIFACTS
    guards.carried_out(*files.WITH_PRESET.split(), "edited")
    return {
        "moments": files.numbers_of_moments(cc.Moments.load(folder / "moments.safetensors")),
        "half-collected moments": files.numbers_of_moments(whole),
        **{kind: files.numbers_of_delta(folder / f"{kind}.safetensors") for kind in ("low_rank", "dense")},
        "preset": {
            "hparams": vars(load_hparams("preset.toml", "finetune", "error_injection", 1)),
            "edits": guards.digests(Path("edited")),
        },
        **{name: guards.digests(folder / name) for name in files.COMMANDS},
        "analysed folders": files.analysed_folders(folder),
    }


def without_times(folder: Path) -> None:
    """Fixed values for seconds and times of day; no locks and logs, which no run needs to go on."""
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".lock", ".log"):
            file.unlink()
        elif file.name == "run.json":
            content = file.read_text(encoding="utf-8")
            content = re.sub(r'("begun": )"[^"]*"', r'\1"2025-01-01T00:00:00+0000"', content)
            file.write_text(re.sub(r'("seconds": )[\d.]+', r"\g<1>0.125", content), encoding="utf-8")
        elif file.name == "preset.toml":
            content = file.read_text(encoding="utf-8")
            file.write_text(re.sub(r"Tuned on [\d-]+", "Tuned on 2025-01-01", content), encoding="utf-8")
        elif file.suffix == ".parquet":
            table = pq.read_table(file)
            notes = json.loads((table.schema.metadata or {}).get(b"causalcone", b"{}"))
            if "seconds" in notes:
                noted = {"causalcone": json.dumps({**notes, "seconds": 0.125})}
                pq.write_table(table.replace_schema_metadata(noted), file, compression="zstd")


def documented_names() -> dict[str, list[str]]:
    """What pages take from modules of causalcone, and where."""
    found: dict[str, set[str]] = {}

    def note(name: str, place: Path) -> None:
        found.setdefault(name, set()).add(place.relative_to(ROOT).as_posix())

    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"^::: (causalcone[\w.]*)", text, re.M):
            note(name, page)
        for name in re.findall(r"\bcausalcone(?:\.[A-Za-z_]\w*)+", text):
            note(name, page)
        for module, names in re.findall(r"^ *from (causalcone[\w.]*) import ([\w, ]+)", text, re.M):
            for name in names.split(","):
                note(f"{module}.{name.strip()}", page)
        for name, module in re.findall(r"`(\w+)\([^`]*\)` of `(causalcone[\w.]*)`", text):
            note(f"{module}.{name}", page)
        for name in re.findall(r"\bcc((?:\.[A-Za-z_]\w*)+)", text):
            note(f"causalcone{name}", page)
    return {name: sorted(places) for name, places in sorted(found.items()) if is_name(name)}


def is_name(name: str) -> bool:
    """Whether it can be imported: pages also have names of files and of metadata. What is left out is said."""
    try:
        public.resolved(name)
    except (ImportError, AttributeError):
        print("no name:", name)
        return False
    return True


def rounded(value: Any) -> Any:
    """To ten digits: polars adds up in an order of its own."""
    if isinstance(value, float):
        return float(f"{value:.10g}")
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return {key: rounded(each) for key, each in value.items()} if isinstance(value, dict) else value


def write_json(path: Path, value: Any) -> None:
    """With innermost lists and tables on a line each."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    for innermost in (r"\[\n[^\[\]{}]*\]", r"\{\n[^{}]*\}"):
        text = re.sub(innermost, lambda found: re.sub(r"\n *", " ", found[0]), text)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    for folder in (guards.ARTIFACTS, guards.SNAPSHOTS):
        shutil.rmtree(folder, ignore_errors=True)
    guards.SNAPSHOTS.mkdir()
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        make_files()
        sweep = half_swept()
        shutil.copytree(made, guards.ARTIFACTS, ignore=shutil.ignore_patterns("study", ".partial"))
        without_times(guards.ARTIFACTS)
        write_json(guards.ARTIFACTS / "expected.json", {**numbers(), "sweep": sweep})

        study = Path("study")
        found = sweeps.analyses(study)
        guards.carried_out("analyze", study, "--no-figures", "--draws", "100", "--out", "analysed")
        analysed = {
            "schemas": {
                name: [[key, str(kind)] for key, kind in frame.schema.items()] for name, frame in found.items()
            },
            "digests": rounded({name: guards.digest(frame) for name, frame in found.items()}),
            "read": sweeps.polars_schemas(),
            "analyze": sweeps.made_files(Path("analysed")),
        }
        write_json(guards.SNAPSHOTS / "analysis.json", analysed)
        tables = {"sweep": guards.arrow_schemas(study), **sweeps.rare_schemas()}
        write_json(guards.SNAPSHOTS / "tables.json", tables)
        os.chdir(ROOT)
    write_api()
    write_json(HERE / "documented_names.json", {"names": documented_names()})


def write_api() -> None:
    write_json(guards.SNAPSHOTS / "api.json", public.api())
    write_json(guards.SNAPSHOTS / "commands.json", public.commands())
    write_json(guards.SNAPSHOTS / "help.json", {"typer": typer.__version__, "texts": public.help_texts()})


if __name__ == "__main__":
    write_api() if sys.argv[1:] == ["--api"] else main()
