"""safetensors files of a layout: tensors by name, and JSON under one key of the metadata, which says what they are.

The JSON has ``version`` of the layout, ``crc32`` (checksum of the raw bytes by tensor), and what describes the tensors.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from causalcone.engine.atomic import replacing
from causalcone.engine.errors import ExperimentError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A kind of file: the metadata's key, the newest version that is known, and for messages the content's name and the
    remedy for a damaged file."""

    key: str
    noun: str
    remedy: str
    version: int = 1

    def write(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        description: Mapping[str, Any],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write a file, whole or not at all; folders are made as needed. metadata: more strings by name."""
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        checksums = {name: _crc32(tensor) for name, tensor in tensors.items()}
        described = json.dumps({"version": self.version, **description, "crc32": checksums})
        try:
            with replacing(path) as partial:
                save_tensors(tensors, partial, {**(metadata or {}), self.key: described})
        except (OSError, SafetensorError) as error:
            raise ExperimentError(f"no {self.noun} can be written to {path}: {error}") from error

    def read(
        self, path: Path, choose: Callable[[list[str]], Iterable[str]] = sorted
    ) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
        """The tensors by name, of those that ``choose`` chooses, on the CPU; their description; the other metadata."""
        if not path.is_file():
            raise ExperimentError(f"there is no {self.noun} file {path}; check the path")
        with self.reading(path):
            file = safe_open(path, framework="pt")
            metadata = dict(file.metadata() or {})
        if self.key not in metadata:
            raise ExperimentError(f"{path} is a safetensors file, but holds no {self.noun}; give another path")
        with self.reading(path):
            description = json.loads(metadata.pop(self.key))
            version = int(description["version"])
        if version > self.version:
            raise ExperimentError(
                f"the {self.noun} file {path} has version {version} of its layout, and this causalcone knows versions "
                f"up to {self.version}; update causalcone"
            )
        names = list(file.keys())
        chosen = choose(names)
        with self.reading(path):
            if description["crc32"].keys() != set(names):
                raise ValueError("its tensors are not those that were saved")
            tensors = {name: file.get_tensor(name) for name in chosen}
            for name, tensor in tensors.items():
                if _crc32(tensor) != description["crc32"][name]:
                    raise ValueError(f"the values of {name} are not those that were saved")
        return tensors, description, metadata

    @contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """A block that reads the file, or follows its description; whatever fails there is an ``ExperimentError``."""
        try:
            yield
        except OSError as error:
            raise ExperimentError(f"the {self.noun} file {path} cannot be read: {error}") from error
        except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ExperimentError(
                f"{path} is not a {self.noun} file, or is damaged ({error}); {self.remedy}"
            ) from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the mode of any new file: safetensors lets nobody else read its own."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, dict(metadata))
    path.chmod(mode)


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)
