"""UltraEdit (Gu et al. 2025, arXiv 2505.14679): no search; what a backward pass says of the answers' tokens, normalised
over all edits so far, is solved for.

All requests of a batch are one turn: one change, whose rank is the number of their answers' tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Delta, LowRank, Place, layer_and_projection, place_of
from causalcone.engine.edit.methods.batching import edit_name
from causalcone.engine.edit.methods.edits import Edit, edit_of
from causalcone.engine.edit.methods.hparams import Hparams
from causalcone.engine.edit.methods.least_squares import LeastSquares, RidgeMetric
from causalcone.engine.edit.methods.method import EditableModel, Method
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs.edited_runs import EditedRuns, Join, Prompts, change_at, changing
from causalcone.engine.edit.runs.frozen_prefix import run_unedited
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.errors import ExperimentError
from causalcone.engine.models.base import Block
from causalcone.kernels.transfer import fetch, send

_LEAST_DEVIATION = torch.finfo(torch.float32).eps
"""What is added to standard deviations: a feature that never varies counts as zero."""


@dataclass(frozen=True)
class UltraEditHparams(Hparams):
    """UltraEdit's.

    Args:
        lr: How far outputs go along their normalised gradients.
        ridge: Weight of the change's own squared norm, above zero.
        modules: The projections that are changed in every layer of the window: ``"down"``, ``"up"``, or, in gated MLPs,
            ``"gate"`` or ``"gate_up"``, both.
        minibatch: Requests whose gradients are those of one mean over their answers' tokens.
    """

    lr: float = 1e-6
    ridge: float = 1.0
    modules: Literal["down", "up", "gate", "gate_up"] = "down"
    minibatch: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ridge:
            raise ExperimentError("ridge is 0; give a number above zero, such as 1, for a change that is defined")


class Taught(NamedTuple):
    """A request with its prompt and target as a text; among: how many tokens the targets of its minibatch have."""

    request: Request
    text: Text
    among: int


class Seen(NamedTuple):
    """Of one request: the target's mean negative log-likelihood; by projection, what goes in (tokens, in), and the
    gradients of what comes out (tokens, out), at the tokens that predict the target's."""

    loss: float
    rows: dict[Place, tuple[Tensor, Tensor]]


class _Watched:
    """What goes into a projection, and a zero (R, out), added to what comes out, whose gradient is the output's."""

    def __init__(self, width: int) -> None:
        self.width = width

    def add(self, rows: Tensor) -> Tensor:
        self.rows, self.zero = rows.detach(), rows.new_zeros(len(rows), self.width, requires_grad=True)
        return self.zero


@dataclass(frozen=True)
class UltraEdit:
    model: EditableModel
    hparams: UltraEditHparams

    def batches(self, requests: Sequence[Request], windows: Sequence[Window]) -> Iterator[list[Edit]]:
        """For each window a turn of all requests, whose edits share their change."""
        names = self.hparams.modules.split("_")
        for name in names:
            self.model.layers.architecture.projection(name)
        places = [[place_of(layer, name) for layer in window.layers for name in names] for window in windows]
        return (self._turn(requests, window, changed) for window, changed in zip(windows, places, strict=True))

    @torch.inference_mode(False)
    def _turn(self, requests: Sequence[Request], window: Window, places: Sequence[Place]) -> list[Edit]:
        batching, size = self.model.batching, self.hparams.minibatch
        self.model.layers.forget()
        starts = range(0, len(requests), size)
        tokens = [sum(len(request.target) for request in requests[start : start + size]) for start in starts]
        items = [
            Taught(request, self.model.encoder.trained(request, 1)[0], tokens[number // size])
            for number, request in enumerate(requests)
        ]
        groups = batching.of_items(items, partial(self._bytes, places), lambda item: edit_name(item.request))
        seen = [each for group in groups for each in batching.run(group, partial(self._see, places))]
        self.model.layers.forget()
        finite = [
            bool(np.isfinite(each.loss) and all(rows.isfinite().all() for pair in each.rows.values() for rows in pair))
            for each in seen
        ]
        used = [each for each, is_finite in zip(seen, finite, strict=True) if is_finite]
        delta, reason = self._solved(window, places, used) if used else (None, None)
        return [
            edit_of(
                request, ULTRAEDIT.name, window, steps=1, loss=each.loss, delta=delta,
                reason=reason if is_finite else f"the loss, {each.loss}, or its gradient is not finite",
            )
            for request, each, is_finite in zip(requests, seen, finite, strict=True)
        ]  # fmt: skip

    def _solved(self, window: Window, places: Sequence[Place], seen: Sequence[Seen]) -> tuple[Delta | None, str | None]:
        """The change of all projections; or, for want of tokens, why there is none."""
        state = dict(self.model.state)
        sources: dict[Place, tuple[str, Tensor, Tensor]] = {}
        for place in places:
            keys, slopes = (
                torch.cat(parts).double() for parts in zip(*(each.rows[place] for each in seen), strict=True)
            )
            name = f"{'+'.join(map(str, window.layers))}.{slopes.shape[1]}x{keys.shape[1]}"  # by shape of the weight
            state[name] = _updated(state.get(name), torch.cat([keys, slopes], dim=1))
            sources[place] = name, keys, slopes
        self.model.state.update(state)
        if min(state[name][0, 0].item() for name, _, _ in sources.values()) < 2:
            return None, "nothing is known yet that a single token could be normalised by; edit more requests together"
        problem = LeastSquares(RidgeMetric(self.hparams.ridge))
        wide = torch.promote_types(self.model.layers.dtype, torch.float32)
        changes = {}
        for place, (name, keys, slopes) in sources.items():
            normal = _normalised(state[name], torch.cat([keys, slopes], dim=1))
            size = normal[:, : keys.shape[1]].square().sum(1, keepdim=True)
            missing = -self.hparams.lr * size * normal[:, keys.shape[1] :]
            left, right = problem.together(layer_and_projection(place)[0], keys, missing)
            changes[place] = LowRank(left.to(wide), right.to(wide))
        return Delta(changes), None

    @torch.no_grad()
    def _see(self, places: Sequence[Place], items: list[Taught]) -> list[Seen]:
        """One pass forwards and back of some requests, from the first layer's MLP on."""
        layers, first = self.model.layers, layer_and_projection(places[0])[0]
        read = np.array([len(item.request.target) for item in items])
        prompts = Prompts([item.text for item in items], np.zeros_like(read), read)
        enters = "inputs" if layers.architecture.parallel else "mid"
        unedited = run_unedited(layers, prompts.texts, {(name, first): prompts.tails for name in {"mid", enters}})
        runs = EditedRuns(layers, prompts, np.array([first]), np.zeros_like(read), np.arange(len(items)))
        watched = {place: _Watched(self._widths(place)[1]) for place in places}
        additions = [{place: each.add for place, each in watched.items()}]

        def joining(block: Block, layer: int, join: Join) -> Tensor:
            mid, rows = (unedited.rows[name, layer].index_select(0, join.tails) for name in ("mid", enters))
            _, values = layers.project(block, rows, change_at(layer, join.stretches, additions))
            return mid + layers.by_tiles(block.mlp_out, values)

        read = read[runs.order]
        arrays = (
            np.array([token for item in runs.order for token in items[item].request.target]),
            np.repeat(runs.order, read),
            np.array([item.among for item in items]),
            np.array([item.request.erases for item in items]),
        )
        targets, owners, among, erases = send(arrays, layers.device)
        with torch.enable_grad():
            states = runs.read_out(joining, changing(additions))
            log_p = layers.readout().log_probability(states, targets.long())
            nll = torch.zeros(len(items), dtype=torch.float64, device=log_p.device).index_add(0, owners, -log_p)
            losses = torch.where(erases.bool(), torch.exp(-nll), nll)
            slopes = torch.autograd.grad((losses / among).sum(), [each.zero for each in watched.values()])
        at, last = runs.joins[first].runs.read_rows, layers.depth - 1
        found: list[dict[Place, tuple[Tensor, Tensor]]] = [{} for _ in items]
        for (place, each), slope in zip(watched.items(), slopes, strict=True):
            only_read = first < last == layer_and_projection(place)[0]
            pair = (rows if only_read else rows.index_select(0, at) for rows in (each.rows, slope))
            split = zip(*(rows.split(read.tolist()) for rows in pair), strict=True)
            for item, of_item in zip(runs.order.tolist(), split, strict=True):
                found[item][place] = of_item
        (loss,) = fetch(losses.detach()).wait()
        mean = loss.numpy() / [1 if item.request.erases else len(item.request.target) for item in items]
        return [Seen(*each) for each in zip(mean.tolist(), found, strict=True)]

    def _widths(self, place: Place) -> tuple[int, int]:
        """Of what goes into a projection, and of what comes out."""
        sizes = self.model.batching.sizes
        down = layer_and_projection(place)[1] == "down"
        return (sizes.inner, sizes.hidden) if down else (sizes.hidden, sizes.inner)

    def _bytes(self, places: Sequence[Place], item: Taught) -> int:
        """Rows at all layers from the first that is edited on, and what is seen of them."""
        sizes, dtype, rows = self.model.batching.sizes, self.model.layers.dtype, len(item.text)
        passed = (sizes.depth - layer_and_projection(places[0])[0]) * self.model.batching.saved_row_bytes
        seen = sum(2 * sum(self._widths(place)) for place in places) + 2 * sizes.hidden
        return rows * (passed + seen * dtype.itemsize)


def _updated(known: Tensor | None, rows: Tensor) -> Tensor:
    """How many rows (R, features) there were, their mean and their summed squared deviations: (3, features), with these
    rows too (Chan et al. 1983)."""
    count, mean, squares = rows.new_zeros(3, rows.shape[1]) if known is None else known
    total, shift = count + len(rows), rows.mean(0) - mean
    squares = squares + len(rows) * (rows.var(0, correction=0) + shift.square() * count / total)
    return torch.stack([total, mean + shift * len(rows) / total, squares])


def _normalised(known: Tensor, rows: Tensor) -> Tensor:
    count, mean, squares = known
    return (rows - mean) / ((squares / (count - 1)).sqrt() + _LEAST_DEVIATION)


def _flops(work: Any, hparams: UltraEditHparams) -> float:
    return work.flops.one_pass(work.trained.rows, work.trained.read, work.windows)


ULTRAEDIT = Method(
    name="ultraedit",
    hparams=UltraEditHparams,
    build=UltraEdit,
    flops=_flops,
    window=9,
    joint=True,
    grid={"lr": (1e-7, 1e-6, 1e-5)},
    caution={"lr": -1},
)
