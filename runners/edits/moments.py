"""Second moments on the command line: collected over running text with progress, and written to a file."""

import os
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console

from causalcone.engine.edit.moments.collect import collect
from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.errors import ExperimentError
from causalcone.engine.run.session import Session
from causalcone.runners.edits.settings import parse_layers
from causalcone.runners.inputs.inputs import open_session
from causalcone.runners.inputs.running_text import RunningText, open_texts
from causalcone.runners.options import CollectingOptions, ComputeOptions, MomentsFileOptions, TextOptions
from causalcone.runners.results.folder import ResultError
from causalcone.runners.show.progress import shown_progress


def collect_to_file(
    computing: ComputeOptions, texts: TextOptions, choice: CollectingOptions, target: MomentsFileOptions
) -> str:
    """Collect moments into the file ``target.out``; says what is there. A collection that ends early is kept beside it,
    or in ``target.resume``, and taken up from there; once the moments are written, that file is deleted."""
    parsed, tokens, text = parse_layers(choice.layers), _tokens(choice.tokens), open_texts(**vars(texts))
    layers = None if isinstance(parsed, str) else parsed
    _make_ready(target)
    partial = target.resume or target.out.with_name(f"{target.out.name}.partial")
    session, console = open_session(computing), Console()
    if partial.exists() and not target.quiet:
        console.print(f"going on with {partial}", highlight=False)
    started = time.monotonic()
    length = choice.length
    moments = collected(session, text, layers, console, target.quiet, tokens=tokens, length=length, resume=partial)
    moments.save(target.out)
    with suppress(OSError):
        partial.unlink(missing_ok=True)
    _warn_of_few(moments)
    count, seconds = moments.tokens[moments.layers[0]], time.monotonic() - started
    return f"second moments of {len(moments.layers)} layers over {count:,} tokens in {seconds:.1f} s -> {target.out}"


def _make_ready(target: MomentsFileOptions) -> None:
    """Refuse a file that cannot be written before hours go into what is to be written there."""
    out, folder = target.out, target.out.parent
    if out.is_dir():
        raise ResultError(f"{out} is a folder; name a file to write the moments to")
    if out.exists() and not target.overwrite:
        raise ResultError(f"{out} exists already; choose another file, or give --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultError(f"cannot write to {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ResultError(f"cannot write to {folder}: permission denied")


def _warn_of_few(moments: Moments) -> None:
    """Fewer keys than they have components do not span them."""
    few = [layer for layer in moments.layers if moments.tokens[layer] < moments.width(layer)]
    if few:
        warnings.warn(
            f"{moments.tokens[few[0]]:,} tokens are too few for keys of width {moments.width(few[0])}: these moments "
            "are singular, and of use with a ridge only (edit --ridge 0.01); take more tokens",
            stacklevel=2,
        )


def collected(
    session: Session, text: RunningText, layers: Sequence[int] | None, console: Console, quiet: bool, **options: Any
) -> Moments:
    """The moments of a session's model; options are those of ``Moments.collect``."""
    with shown_progress(console, "second moments", "tokens", quiet) as progress:
        return Moments(*collect(session, text.texts, layers, source=text.source, progress=progress, **options))


def _tokens(tokens: str | None) -> int | str | None:
    if tokens is None or tokens == "all":
        return tokens
    try:
        return int(tokens)
    except ValueError:
        raise ExperimentError(f"tokens are {tokens!r}; give a positive number, or all") from None
