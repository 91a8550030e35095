"""The demo model: its training masks, its cache, and what the trained model knows."""

import os
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from causalcone.engine.localize.tracer import Tracer
from causalcone.runners.demo import model as demo
from causalcone.runners.demo.corpus import Packing, batches, running_texts, tokenized
from causalcone.runners.demo.training import Recipe, _hidden, config_of
from causalcone.runners.demo.world import World
from causalcone.runners.facts.files import load_facts
from causalcone.runners.inputs.reference_texts import as_reference_texts, load_reference_texts
from causalcone.runners.inputs.running_text import open_texts
from causalcone.runners.names import Kind, path_of

QUICK = Recipe(subjects=12, layers=3, width=16, heads=2, steps=3, packing=Packing(rows=4), first_open_layer=2)


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A recipe of three steps, and a cache of its own."""
    monkeypatch.setitem(demo.RECIPES, "demo", QUICK)
    monkeypatch.setenv("CAUSALCONE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def trained():
    """The demo model, trained with all cores if it is not in the cache."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        return demo.demo_model(progress=False)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world():
    return demo.demo_world()


def packed(unmasked, isolated):
    world = World.generate(QUICK.subjects)
    bpe = demo.train_tokenizer(world)
    packing = Packing(rows=6, isolated=isolated, unmasked=unmasked)
    opening, inner = (tokenized(world, bpe, packing, lead) for lead in ("", " "))
    batch = next(batches(opening, inner, bpe.bos_token_id, packing, np.random.default_rng(0)))
    torch.manual_seed(0)
    return world, bpe, batch, GPT2LMHeadModel(config_of(bpe, QUICK)).eval()


@torch.no_grad()
def test_without_masks_training_computes_plain_gpt2():
    _, _, batch, model = packed(unmasked=1.0, isolated=0.0)
    expected = model.transformer(batch.ids).last_hidden_state
    torch.testing.assert_close(_hidden(model, batch, QUICK.first_open_layer), expected)


@torch.no_grad()
def test_isolated_sentences_are_computed_as_if_alone():
    _, bpe, batch, model = packed(unmasked=1.0, isolated=1.0)
    hidden = _hidden(model, batch, QUICK.first_open_layer)
    second = int((batch.positions[0] == 0).nonzero()[1])
    third = int((batch.positions[0] == 0).nonzero()[2])
    alone = model.transformer(batch.ids[:1, second:third]).last_hidden_state
    torch.testing.assert_close(hidden[:1, second:third], alone)
    assert not bpe.decode(batch.ids[0, second:third]).startswith(" ")


@torch.no_grad()
def test_masked_words_learn_of_the_subject_from_its_last_token_only():
    """Another first name changes the words after the name where they may read its last token, and not elsewhere."""
    world, bpe, batch, model = packed(unmasked=0.0, isolated=1.0)
    row, at = first_two_part_name(world, bpe, batch)
    changed = batch.ids.clone()
    changed[row, at] = bpe("tennis")["input_ids"][0]

    def word_after(ids, first_open_layer):
        return _hidden(model, replace(batch, ids=ids), first_open_layer)[row, at + 2]

    never = QUICK.layers
    torch.testing.assert_close(word_after(batch.ids, never), word_after(changed, never))
    # The last token gathers the name in one layer and is read in the next.
    assert not torch.allclose(word_after(batch.ids, 1), word_after(changed, 1), atol=1e-6)


def first_two_part_name(world, bpe, batch):
    """The row and the column where a sentence of the batch begins with a name of two tokens."""
    names = {subject.name for subject in world.subjects if len(subject.name.split()) == 2}
    for row, column in (batch.positions == 0).nonzero().tolist():
        if bpe.decode(batch.ids[row, column : column + 2]) in names:
            return row, column
    raise AssertionError("no sentence of this batch begins with a name of two parts")


def test_padding_and_first_words_are_not_predicted():
    _, bpe, batch, _ = packed(unmasked=0.2, isolated=0.5)
    assert (batch.weights[batch.positions == 0] == 0).all()
    assert (batch.weights[batch.ids == bpe.bos_token_id] == 0).all()
    assert (batch.weights == 1).any()


def test_training_is_repeatable_and_leaves_no_trace(quick):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    numpy_state = np.random.get_state()[1].copy()
    first, _ = demo.demo_model(progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == torch.float32
    for entry in quick.iterdir():
        entry.rename(quick.parent / f"moved-{entry.name}")
    torch.manual_seed(99)
    second, _ = demo.demo_model(progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_second_call_loads_what_the_first_one_trained(quick, monkeypatch):
    first, _ = demo.demo_model(progress=False)
    monkeypatch.setattr(demo, "trained", None)  # calling it would fail
    second, _ = demo.demo_model(progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_another_recipe_is_another_folder(quick, monkeypatch):
    first = demo.demo_folder(progress=False)
    monkeypatch.setitem(demo.RECIPES, "demo", replace(QUICK, steps=2))
    assert demo.demo_folder(progress=False) != first


def test_interrupted_training_leaves_nothing_that_looks_finished(quick, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "trained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.demo_folder(progress=False)
    assert not [entry for entry in quick.iterdir() if entry.is_dir()]
    assert demo.demo_folder(progress=False).is_dir()


def test_left_overs_of_a_killed_training_are_swept(quick):
    folder = demo.demo_folder(progress=False)
    left_over = folder.with_name(f".{folder.name}.killed.partial")
    folder.rename(left_over)
    assert demo.demo_folder(progress=False) == folder
    assert not left_over.exists()


def test_folder_loads_through_the_auto_classes(quick):
    folder = demo.demo_folder(progress=False)
    model, bpe = demo.demo_model(progress=False)
    auto_model, auto_bpe = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "On stage, Anna Berger is most often heard on the"
    assert auto_bpe(text)["input_ids"] == bpe(text)["input_ids"]
    assert auto_bpe.is_fast
    inputs = torch.tensor([bpe(text)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(auto_model(inputs).logits, model(inputs).logits)


def test_the_name_demo_stands_for_files_in_the_cache(quick, tmp_path, monkeypatch):
    """They are made once, and hold the world that the model knows; a file called demo is meant where there is one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    paths = {kind: Path(path_of("demo", kind)) for kind in get_args(Kind)}
    written = {path: path.stat().st_mtime_ns for path in paths.values()}
    assert all(path.parent == quick for path in written)
    assert {Path(path_of("demo", kind)): path.stat().st_mtime_ns for kind, path in paths.items()} == written
    world = demo.demo_world()
    assert load_facts(paths["facts"]) == world.facts
    texts = open_texts(texts="demo")
    assert (list(texts.texts), texts.source) == (running_texts(world), "the demo world's sentences")
    assert load_reference_texts(paths["snippets"]) == as_reference_texts(world.snippets(), "the world")
    assert AutoConfig.from_pretrained(paths["outline"]).n_layer == QUICK.layers
    assert AutoTokenizer.from_pretrained(paths["outline"]).get_vocab() == demo.train_tokenizer(world).get_vocab()
    assert path_of("gpt2", "model") == "gpt2"
    Path("demo").touch()
    assert path_of("demo", "facts") == "demo"


def test_progress_is_plain_lines_away_from_a_terminal(quick, capfd):
    demo.demo_folder(progress=True)
    lines = [line for line in capfd.readouterr().err.splitlines() if "training" in line]
    assert lines[-1].startswith("training the demo model (once): 3/3 steps, ")
    assert not any("\x1b" in line for line in lines)


@torch.no_grad()
def recall(model, bpe, facts):
    """The share of facts whose greedy continuation is target_true, all of its tokens."""
    right = 0
    for fact in facts:
        prompt, answer = (bpe(text)["input_ids"] for text in (fact.text, " " + fact.target_true))
        predicted = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].argmax(-1)
        right += predicted.tolist() == answer
    return right / len(facts)


@pytest.mark.demo
def test_recall_of_rewrite_prompts(trained, world):
    assert recall(*trained, world.facts) >= 0.95


@pytest.mark.demo
def test_recall_of_held_out_phrasings(trained, world):
    assert recall(*trained, world.held_out_facts()) >= 0.85


@pytest.mark.demo
def test_what_stands_before_the_prompt_does_not_matter(trained, world):
    facts = [replace(fact, prompt=f"Bread was cheap in those days. {fact.prompt}") for fact in world.facts[::6]]
    assert recall(*trained, facts) >= 0.9


@pytest.mark.demo
def test_demo_model_has_an_early_and_a_late_site(trained, world):
    rows = Tracer(*trained).trace(world.facts[::12], states=(("hidden", 1), ("mlp", 3)), samples=4).to_pandas()
    rows["effect"] = rows["p_patched"] - rows["p_corrupted"]
    rows["site"] = np.select(
        [rows["token"] == rows["subject_end"] - 1, rows["token"] == rows["prompt_tokens"] - 1], ["subject", "last"], ""
    )
    mean = rows.groupby(["kind", "site", "layer"])["effect"].mean()
    early, late = mean["hidden", "subject"], mean["hidden", "last"]
    half = len(early) // 2
    assert early[:half].min() > 0.25
    assert early[half - 1] > 2 * early.iloc[-2]
    assert abs(late[: half - 1]).max() < 0.1
    assert late.iloc[-1] > 0.5
    assert mean["mlp", "subject"][:2].max() > 2 * mean["mlp", "subject"].iloc[-3:].max()
