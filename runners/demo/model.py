"""The demo model: a small GPT-2 that knows the demo world, trained on first use and kept in the cache folder."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

from causalcone.engine.atomic import write_text
from causalcone.engine.cache import cache_folder, kept_folder
from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.errors import ExperimentError
from causalcone.runners.demo.corpus import running_texts, texts
from causalcone.runners.demo.training import Recipe, config_of, trained
from causalcone.runners.demo.world import TITLES, World
from causalcone.runners.show.progress import shown_progress

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_LIMIT = 5000  # merging stops earlier, when every word of the world is one token

RECIPES = {"demo": Recipe()}


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

    def fill(folder: Path, world: World, recipe: Recipe) -> None:
        tokenizer = train_tokenizer(world)
        title = "training the demo model (once)"
        with shown_progress(Console(stderr=True), title, "steps", quiet=not progress) as report:
            model = trained(world, tokenizer, recipe, report)
        with _no_transformers_bars():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _folder("model", size, fill)


def _folder(kind: str, size: str, fill: Callable[[Path, World, Recipe], None]) -> Path:
    """A folder of the cache, filled now if it is not there."""
    recipe, world = RECIPES[size], demo_world(size)
    return kept_folder(f"{size}-{kind}-{_fingerprint(recipe, world)}", lambda folder: fill(folder, world, recipe))


def demo_moments(progress: bool = True, size: str = "demo") -> Moments:
    """Second moments of all layers of the demo model over its training text; collected now, and kept beside the model,
    if those that are kept are not of this model."""
    return Moments.load(_moments_file(progress, size))


def demo_file(kind: str) -> Path:
    """A file or folder of the demo in the cache folder, of a ``Kind`` of runners/names.py, made now if not there."""
    makers: dict[str, Callable[[], Path]] = {
        "model": demo_folder,
        "outline": _outline_folder,
        "moments": _moments_file,
        "facts": lambda: _text_file("facts.json", demo_world().counterfact()),
        "texts": lambda: _text_file("texts.txt", "".join(f"{text}\n" for text in running_texts(demo_world()))),
        "snippets": lambda: _text_file("snippets.json", json.dumps(demo_world().snippets())),
    }
    return makers[kind]()


def _outline_folder() -> Path:
    def fill(folder: Path, world: World, recipe: Recipe) -> None:
        tokenizer = train_tokenizer(world)
        config_of(tokenizer, recipe).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _folder("outline", "demo", fill)


def _moments_file(progress: bool = True, size: str = "demo") -> Path:
    model, tokenizer = demo_model(progress, size)
    folder = demo_folder(progress, size)
    path = folder.with_name(f"{folder.name}-moments.safetensors")
    with FileLock(path.with_suffix(".lock")):
        try:
            Moments.load(path).check(model, range(model.config.n_layer))
        except ExperimentError:
            sentences = running_texts(demo_world(size))
            Moments.collect(model, tokenizer, sentences, tokens="all", source=TITLES["texts"]).save(path)
    return path


def _text_file(name: str, text: str) -> Path:
    """A file whose name has a hash of its content."""
    stem, ending = name.split(".")
    path = cache_folder() / f"demo-{stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.{ending}"
    if not path.exists():
        write_text(path, text)
    return path


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
    """Turns the library's progress bars off, which would be shown for files of a few megabytes."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
