"""Folders that are made once and kept: trained models, and models of files that are slow to read."""

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from causalcone.engine.atomic import remove_partial, replacing_folder


def cache_folder() -> Path:
    """Where they are kept: ``$CAUSALCONE_CACHE``, or the platform's cache folder."""
    if folder := os.environ.get("CAUSALCONE_CACHE"):
        return Path(folder)
    import platformdirs  # here, so that a model that is passed does without it

    return Path(platformdirs.user_cache_dir("causalcone"))


def kept_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled now if it is not there."""
    folder = cache_folder() / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # a second process waits for what the first one makes
        if not folder.exists():
            remove_partial(folder.parent, folder.name)
            with replacing_folder(folder) as partial:
                fill(partial)
    return folder
