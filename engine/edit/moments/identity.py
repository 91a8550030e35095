"""The identity of a model whose keys moments are of: fingerprints of the weights that each layer's keys depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from causalcone.engine.models.base import Architecture
from causalcone.kernels.transfer import fetch

_SAMPLED = 4096
_ROUNDED = {
    torch.float64: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
}
"""For a dtype, those that its values can be rounded to, the finest first."""


@dataclass(frozen=True)
class Identity:
    """The model that keys are of. name: where it was loaded from, for messages; fingerprints: by layer, and by dtype.

    Fingerprints are of the weights that the layer's keys depend on, rounded to the dtype: a hash of up to 4,096 values,
    evenly spaced, of every parameter outside of layers, in the layers below, and in the layer itself except its
    down-projection. So an edit changes the identity for all layers above it, but not for the edited layer.
    """

    model_type: str
    name: str
    sizes: Mapping[str, int]
    fingerprints: Mapping[int, Mapping[str, str]]

    @classmethod
    def of(cls, architecture: Architecture, layers: Collection[int]) -> Identity:
        """The identity of a model for the keys of some layers; those that it does not have are left out."""
        sizes, config = architecture.sizes, architecture.model.config
        return cls(
            model_type=config.model_type,
            name=str(getattr(config, "name_or_path", "") or ""),
            sizes={
                "number of layers": sizes.depth,
                "width of hidden states": sizes.hidden,
                "width of keys": sizes.inner,
                "size of the vocabulary": sizes.vocabulary,
            },
            fingerprints=_fingerprints(architecture, [layer for layer in layers if layer < sizes.depth]),
        )

    def difference(self, other: Identity, layers: Iterable[int]) -> str | None:
        """In words, how another model differs from this one for the keys of some layers; None if it does not."""
        if other.model_type != self.model_type:
            return f"the architecture is {other.model_type}, not {self.model_type}"
        for size, value in self.sizes.items():
            if other.sizes.get(size) != value:
                return f"the {size} is {other.sizes.get(size)}, not {value}"
        for layer in layers:
            mine, others = self.fingerprints[layer], other.fingerprints[layer]
            common = [dtype for dtype in mine if dtype in others]
            if not common:
                return f"the weights are in {next(iter(others))}, which cannot be compared with {next(iter(mine))}"
            if mine[common[0]] != others[common[0]]:
                return f"the weights that the keys of layer {layer} depend on are others"
        return None


def model_fingerprint(architecture: Architecture) -> str:
    """A short hash that changes with the weights of a model, but for those of the last down-projection."""
    last = architecture.sizes.depth - 1
    weights = Identity.of(architecture, [last]).fingerprints[last]
    return hashlib.sha256(repr(sorted(weights.items())).encode()).hexdigest()[:16]


def key_width(architecture: Architecture, layer: int) -> int:
    weight = architecture.model.get_submodule(architecture.down_projection.format(layer)).weight
    return int(weight.numel()) // architecture.sizes.hidden


def _fingerprints(architecture: Architecture, layers: Collection[int]) -> dict[int, dict[str, str]]:
    parameters = dict(architecture.model.named_parameters())
    dtypes = [
        dtype
        for dtype in _ROUNDED[torch.float64]
        if all(dtype in _ROUNDED[parameter.dtype] for parameter in parameters.values())
    ]
    hashes = {dtype: hashlib.sha256() for dtype in dtypes}

    in_layers, top = architecture.down_projection.split("{}")[0], max(layers, default=-1)

    def needed(name: str) -> bool:
        return not name.startswith(in_layers) or int(name.removeprefix(in_layers).partition(".")[0]) <= top

    # all are asked for before the first is waited for
    samples = {name: fetch(_sample(values)) for name, values in parameters.items() if needed(name)}

    def add(names: Iterable[str]) -> None:
        for name in names:
            (values,) = samples[name].wait()
            for dtype, digest in hashes.items():
                digest.update(repr(tuple(parameters[name].shape)).encode())
                digest.update(values.to(dtype).view(torch.uint8).numpy().tobytes())

    add(sorted(name for name in parameters if not name.startswith(in_layers)))
    fingerprints: dict[int, dict[str, str]] = {}
    for layer in range(top + 1):
        names = sorted(name for name in parameters if name.startswith(f"{in_layers}{layer}."))
        down = architecture.down_projection.format(layer) + "."
        add(name for name in names if not name.startswith(down))
        if layer in layers:
            fingerprints[layer] = {str(d).removeprefix("torch."): digest.hexdigest() for d, digest in hashes.items()}
        add(name for name in names if name.startswith(down))
    return fingerprints


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """Up to 4,096 values, evenly spaced."""
    flat = parameter.detach().reshape(-1)
    count = min(len(flat), _SAMPLED)
    return flat[torch.arange(count, device=flat.device) * (len(flat) - 1) // max(1, count - 1)]
