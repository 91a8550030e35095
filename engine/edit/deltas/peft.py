"""Low-rank changes as an adapter that PEFT loads, and so do servers of its adapters: a LoRA of scaling 1, whose B is
``left`` and whose A is ``right.T``."""

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from causalcone.engine.edit.deltas.delta import Delta, Dense, LowRank, Place
from causalcone.engine.errors import ExperimentError
from causalcone.engine.tensor_file import save_tensors


class RankCut(UserWarning):
    """A change became one of a smaller ``rank``; ``error``: the norm of what was left out, over that of the change
    (Frobenius)."""

    def __init__(self, rank: int, error: float) -> None:
        super().__init__(rank, error)
        self.rank, self.error = rank, error

    def __str__(self) -> str:
        return (
            f"the change is of more than rank {self.rank}: the adapter leaves out {self.error:.2g} of its norm; give a "
            "larger max_rank, or export the whole model"
        )


def low_rank(delta: Delta) -> dict[Place, LowRank]:
    """The changes by layer; raises ``ExperimentError`` for what no adapter holds."""
    changes: dict[Place, LowRank] = {}
    for layer, change in delta.changes.items():
        if isinstance(change, Dense):
            raise ExperimentError(
                f"the change of layer {layer} is dense (as fine-tuning makes it, or a sum of many edits), which no "
                "adapter holds; export the whole model (format 'model')"
            )
        if not (torch.isfinite(change.left).all() and torch.isfinite(change.right).all()):
            raise ExperimentError(f"the delta's change of layer {layer} holds NaN or infinity; make it anew")
        changes[layer] = change
    if not changes:
        raise ExperimentError("the delta changes no layer; give one that does")
    return changes


def adapted(delta: Delta, dtype: torch.dtype, max_rank: int | None = None) -> tuple[dict[Place, LowRank], float]:
    """The changes by layer as an adapter in ``dtype`` holds them, and the relative error that its largest rank makes,
    which ``RankCut`` warns of."""
    if max_rank is not None and (isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1):
        raise ExperimentError(f"max_rank is {max_rank!r}; give a whole number, at least one, such as 64")
    changes, left_out = low_rank(delta), [0.0]
    cut = max_rank is not None and _rank(changes.values()) > max_rank
    for layer, change in changes.items():
        change = change.to(torch.device("cpu"), torch.float64)
        if max_rank is not None and change.left.shape[1] > max_rank:
            change, missing = _cut(change, max_rank)
            left_out.append(missing)
        changes[layer] = _even(change).to(change.left.device, dtype)
    error = math.hypot(*left_out) / (delta.norm or 1.0)
    if max_rank is not None and cut:
        warnings.warn(RankCut(max_rank, error), stacklevel=4)
    return changes, error


def write_adapter(
    folder: Path, changes: Mapping[str, LowRank], error: float, base: str | None, transposed: bool
) -> None:
    """Write the changes of modules, by their paths, with one rank for all: those of smaller ranks are filled up with
    zeros. error: of the rank; base: what the unedited model is called; transposed: whether weights are (in, out)."""
    rank = _rank(changes.values())
    tensors: dict[str, Tensor] = {}
    for path, change in changes.items():
        missing = rank - change.left.shape[1]
        tensors[f"base_model.model.{path}.lora_A.weight"] = pad(change.right.T, (0, 0, 0, missing)).contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = pad(change.left, (0, missing)).contiguous()
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(changes),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    metadata = {"format": "pt", "causalcone.relative_error": f"{error:.6g}"}
    save_tensors(tensors, folder / "adapter_model.safetensors", metadata)


def _rank(changes: Iterable[LowRank]) -> int:
    return max([1, *(change.left.shape[1] for change in changes)])


def _cut(change: LowRank, rank: int) -> tuple[LowRank, float]:
    """The nearest change of a rank, and the norm of what it leaves out. The singular values of left right^T are those
    of a product of triangular factors, (r, r)."""
    (left, above), (right, below) = torch.linalg.qr(change.left), torch.linalg.qr(change.right)
    before, values, after = torch.linalg.svd(above @ below.T, full_matrices=False)
    kept = LowRank(left @ (before[:, :rank] * values[:rank]), right @ after[:rank].T)
    return kept, torch.linalg.vector_norm(values[rank:]).item()


def _even(change: LowRank) -> LowRank:
    """The same product, of columns that are equally long in left and right but for a power of two: neither leaves the
    range of a narrow dtype."""
    ratio = torch.linalg.vector_norm(change.left, dim=0) / torch.linalg.vector_norm(change.right, dim=0)
    scale = torch.exp2((ratio.log2() / 2).round().nan_to_num(0.0, 0.0, 0.0))
    return LowRank(change.left / scale, change.right * scale)
