"""The demo model: a small GPT-2 that knows the demo world, trained on first use and kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import platformdirs
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.errors import ExperimentError
from causalcone.runners.demo.corpus import running_texts, texts
from causalcone.runners.demo.training import Recipe, trained
from causalcone.runners.demo.world import World

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_LIMIT = 5000  # merging stops earlier, when every word of the world is one token

DEMO_TEXTS = "the demo world's sentences"

RECIPES = {"demo": Recipe()}


def cache_folder() -> Path:
    """Where trained models are kept: ``$CAUSALCONE_CACHE``, or the platform's cache folder."""
    chosen = os.environ.get("CAUSALCONE_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("causalcone"))


def demo_world(size: str = "demo") -> World:
    """The world that the demo model of this size was trained on."""
    return World.generate(RECIPES[size].subjects)


def demo_model(progress: bool = True, size: str = "demo") -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """The demo model and its tokenizer, trained now if that has not been done before."""
    folder = demo_folder(progress, size)
    with _no_transformers_bars():
        model = GPT2LMHeadModel.from_pretrained(folder)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def demo_folder(progress: bool = True, size: str = "demo") -> Path:
    """The folder of the demo model, as ``from_pretrained`` and ``--model`` take it; trained now if it is not there."""
    recipe = RECIPES[size]
    world = World.generate(recipe.subjects)
    folder = cache_folder() / f"{size}-model-{_fingerprint(recipe, world)}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # a second process waits for the first one's model
        if not folder.exists():
            _train_into(folder, world, recipe, progress)
    return folder


def demo_moments(progress: bool = True, size: str = "demo") -> Moments:
    """Second moments of all layers of the demo model over its training text; collected now, and kept beside the model,
    if those that are kept are not of this model."""
    folder = demo_folder(progress, size)
    model, tokenizer = demo_model(progress, size)
    path = folder.with_name(f"{folder.name}-moments.safetensors")
    with FileLock(path.with_suffix(".lock")):
        try:
            moments = Moments.load(path)
            moments.check(model, range(model.config.n_layer))
        except ExperimentError:
            world = demo_world(size)
            moments = Moments.collect(model, tokenizer, running_texts(world), tokens="all", source=DEMO_TEXTS)
            moments.save(path)
    return moments


def _train_into(folder: Path, world: World, recipe: Recipe, progress: bool) -> None:
    """Train beside ``folder`` and move the result there, so that what is killed on the way leaves no half model."""
    for left_over in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        tokenizer = train_tokenizer(world)
        with _reporting(recipe.steps, progress) as report:
            model = trained(world, tokenizer, recipe, report)
        with _no_transformers_bars():
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def train_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, like GPT-2's, whose tokens are the words of the world."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_LIMIT,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(world), trainer)
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **ends)


def _fingerprint(recipe: Recipe, world: World) -> str:
    """Changes with the recipe and with every word of the training text."""
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    for text in texts(world):
        digest.update(text.encode())
    return digest.hexdigest()[:12]


@contextmanager
def _no_transformers_bars() -> Iterator[None]:
    """Without the library's own bars for files of a few megabytes; its setting is put back."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _reporting(steps: int, progress: bool) -> Iterator[Callable[[int, float], None]]:
    """A function to tell the step and the loss to: a bar on a terminal, else a line for every tenth of the way."""
    console = Console(stderr=True)
    if not progress:
        yield lambda step, loss: None
    elif console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn())
        with Progress(TextColumn("Training the demo model (once)"), *columns, console=console) as bar:
            task = bar.add_task("", total=steps, loss=math.nan)
            yield lambda step, loss: bar.update(task, completed=step, loss=loss)
    else:
        start = time.monotonic()

        def tell(step: int, loss: float) -> None:
            if step % max(1, steps // 10) == 0:
                left = (time.monotonic() - start) * (steps - step) / step
                note = f"training the demo model (once): step {step} of {steps}, loss {loss:.3f}, {left:.0f} s left"
                print(note, file=sys.stderr, flush=True)

        yield tell
