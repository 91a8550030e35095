"""The search for v* and z*: vectors that, added at the lookup, make the model say the target (docs/editing.md,
"Methods").

All edits of a batch, at any layers, take their steps together; an edit that is done leaves the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.methods.edits import Edit, edit_of
from causalcone.engine.edit.methods.hparams import RomeHparams, ValueHparams
from causalcone.engine.edit.requests.prompts import EditTask
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs.edited_runs import EditedRuns, Join, Prompts
from causalcone.engine.edit.runs.frozen_prefix import FrozenPrefix, Places, Wanted, run_unedited
from causalcone.engine.edit.runs.layers import Layers
from causalcone.engine.models.base import Block
from causalcone.kernels.adam import AdamState
from causalcone.kernels.transfer import fetch, on_device, send

Site = Literal["values", "out"]
"""What a vector is added to: the output of a layer's down-projection, or the layer's output."""


@dataclass(frozen=True)
class Goal:
    """The goal of a vector: contexts and essence are texts of the prompts, by number; a target's token ids are read
    after each context, the divergence at the essence's end. keyed: how many contexts keys are of, the first ones;
    erases: the target is to become unlikely."""

    contexts: tuple[int, ...]
    essence: int
    targets: tuple[tuple[int, ...], ...]
    keyed: int
    erases: bool


@dataclass(frozen=True)
class FoundValue:
    """delta (hidden,): what was found, in float32 or better; base (hidden,): what it is added to, in the bare prompt;
    steps: updates taken; loss: the last evaluated; reason: why it failed, or None."""

    delta: Tensor
    base: Tensor
    steps: int
    loss: float
    reason: str | None

    def edit(self, request: Request, method: str, window: Window, delta: Delta | None) -> Edit:
        return edit_of(request, method, window, steps=self.steps, loss=self.loss, delta=delta, reason=self.reason)


@dataclass(frozen=True)
class EditObjective:
    """The texts of some requests, each in its contexts and with its essence prompt; and each request's goal."""

    prompts: Prompts
    goals: list[Goal]

    @classmethod
    def of(cls, tasks: Sequence[EditTask]) -> EditObjective:
        prompts = [prompted for task in tasks for prompted in task.prompts]
        read: list[int] = []
        goals: list[Goal] = []
        for task in tasks:
            targets, first, essence = tuple(task.targets), len(read), len(read) + len(task.prompts) - 1
            read += [*map(len, targets), 1]
            goals.append(Goal(tuple(range(first, essence)), essence, targets, task.keyed, task.request.erases))
        lookup = np.array([prompted.lookup for prompted in prompts])
        return cls(Prompts([prompted.text for prompted in prompts], lookup, np.array(read)), goals)

    @property
    def keyed(self) -> np.ndarray:
        """(goals, contexts) texts by number that keys are of, the bare prompt first."""
        return np.array([goal.contexts[: goal.keyed] for goal in self.goals])

    def search(
        self, layers: Layers, at: Collection[int], site: Site, hparams: ValueHparams, more: Wanted
    ) -> ValueOptimizer:
        """The search for vectors at the layers ``at``, after a pass of the texts through the unedited model, of which
        ``more`` is kept than the search needs."""
        essence = np.array([goal.essence for goal in self.goals])
        wanted: dict[tuple[str, int], Places] = {("out", layer): self.prompts.tails for layer in at}
        names = ("values", "mid") if site == "values" else ("values",)
        wanted.update({(name, layer): self.prompts.lookups for layer in at for name in names})
        distributions = essence, self.prompts.lookup[essence]
        unedited = run_unedited(layers, self.prompts.texts, {**wanted, **more}, min(at) + 1, distributions)
        return ValueOptimizer(layers, self, unedited, site, hparams)


@dataclass(frozen=True)
class ValueOptimizer:
    """Searches for the vectors of an objective's goals at a site."""

    layers: Layers
    objective: EditObjective
    unedited: FrozenPrefix
    site: Site
    hparams: ValueHparams

    def base(self, goal: int, layer: int) -> Tensor:
        """(hidden,) what the vector is added to at the lookup of the bare prompt."""
        bare = self.objective.goals[goal].contexts[0]
        row = bare if self.site == "values" else self.objective.prompts.tail_start[bare]
        return self.unedited.rows[self.site, layer][row]

    @torch.no_grad()
    def output(self, goal: int, layer: int) -> Tensor:
        """(hidden,) the MLP's output at the lookup of the bare prompt, as the vector is added to it; float32 or
        better."""
        row = self.unedited.rows["values", layer].narrow(0, self.objective.goals[goal].contexts[0], 1)
        added_to = row if self.site == "values" else self.layers.block(layer).mlp_out(row)
        return added_to[0].to(torch.promote_types(self.layers.dtype, torch.float32))

    @torch.no_grad()
    def _anchored(self, edits: Sequence[tuple[int, int]], found: Sequence[FoundValue]) -> list[FoundValue]:
        """Vectors that take the MLP's output at the lookup to the norm of ``norm_anchor``; none where it is more than
        twice that long (NAS, arXiv 2602.02543)."""
        anchor = self.hparams.norm_anchor
        if anchor is None:
            return list(found)
        anchored = []
        for (goal, layer), value in zip(edits, found, strict=True):
            output = self.output(goal, layer)
            wanted = output + value.delta
            norm = wanted.norm()
            delta = torch.where(norm > 2 * anchor, torch.zeros_like(wanted), wanted * (anchor / norm) - output)
            anchored.append(replace(value, delta=delta))
        return anchored

    @torch.inference_mode(False)
    def find(self, edits: Sequence[tuple[int, int]]) -> list[FoundValue]:
        """The vector of each edit: a goal, by number, and a layer."""
        wide = torch.promote_types(self.layers.dtype, torch.float32)
        base = torch.stack([self.base(*edit) for edit in edits]).to(wide)
        state, size = AdamState.zeros_like(base, wide), base.norm(dim=1)
        values: list[FoundValue | None] = [None] * len(edits)
        live = list(range(len(edits)))
        readings = _Readings(self, edits, size)
        more = np.full(len(edits), np.inf if self.hparams.stops_after is None else self.hparams.stops_after)
        for step in range(self.hparams.steps):
            if not live:
                break
            loss, gradient = readings.evaluate(state.change)
            done = self._done(step, [edits[i] for i in live], loss) | (more[live] <= 0)
            more[live] -= readings.reached | (more[live] < (self.hparams.stops_after or 0))
            for row in np.flatnonzero(done).tolist():
                values[live[row]] = _value(state.change[row], base[live[row]], step, loss[row])
            if done.any():
                rest = on_device(np.flatnonzero(~done), base.device)
                live = [edit for edit, is_done in zip(live, done, strict=True) if not is_done]
                gradient, loss, size = gradient[rest], loss[~done], size[rest]
                state.keep(rest)
                readings = _Readings(self, [edits[i] for i in live], size)
            if live:
                state.step(gradient, self.hparams.lr)
                state.change = _clamped(state.change, self.hparams.clamp * size)
                if step == self.hparams.steps - 1:
                    for row, edit in enumerate(live):
                        values[edit] = _value(state.change[row], base[edit], step + 1, loss[row])
        return self._anchored(edits, [value for value in values if value is not None])

    def joining(self, block: Block, layer: int, join: Join, vectors: Tensor) -> Tensor:
        """The rows of runs after the layer where their vectors, among (E, hidden), are added."""
        kept = self.unedited.rows
        added = vectors[join.edits]
        rows = kept["out", layer].index_select(0, join.tails)
        if self.site == "out":
            return rows.index_add(0, join.lookups, added.to(rows.dtype))
        values = (kept["values", layer].index_select(0, join.texts) + added).to(rows.dtype)
        edited = kept["mid", layer].index_select(0, join.texts) + block.mlp_out(values)
        return rows.index_copy(0, join.lookups.long(), edited)

    def _done(self, step: int, edits: Sequence[tuple[int, int]], loss: np.ndarray) -> np.ndarray:
        """(E,) which edits take no more step: the last one only evaluates, except where ROME erases a fact."""
        last, rome = step == self.hparams.steps - 1, isinstance(self.hparams, RomeHparams)
        done = np.array([last and not (rome and self.objective.goals[goal].erases) for goal, _ in edits])
        low = False if self.hparams.stop_loss is None else loss < self.hparams.stop_loss
        return ~np.isfinite(loss) | low | done


def _value(delta: Tensor, base: Tensor, steps: int, loss: float) -> FoundValue:
    reason = None if np.isfinite(loss) else f"the loss is {loss} after {steps} steps"
    return FoundValue(delta.clone(), base, steps, float(loss), reason)


def _clamped(delta: Tensor, largest: Tensor) -> Tensor:
    """Rows scaled down to norms of at most ``largest`` (E,)."""
    norm = delta.norm(dim=1)
    return delta * torch.where(norm > largest, largest / norm, 1.0)[:, None]


class _Readings:
    """The rows that are read out of the runs of a batch of edits, and the loss that they make."""

    def __init__(self, search: ValueOptimizer, edits: Sequence[tuple[int, int]], size: Tensor) -> None:
        self.search, self.size, self.count = search, size, len(edits)
        self.reached = np.zeros(len(edits), dtype=bool)
        """Which edits' targets were the likeliest in all contexts when last evaluated, where that ends a search."""
        if not edits:
            return
        goals = search.objective.goals
        texts = [(*goals[goal].contexts, goals[goal].essence) for goal, _ in edits]
        of = np.repeat(np.arange(len(edits)), [len(members) for members in texts])
        layer = np.array([layer for _, layer in edits])
        members = np.array([text for members in texts for text in members])
        self.cone = EditedRuns(search.layers, search.objective.prompts, layer, of, members, search.unedited)
        # by run, then in the order of what is read: the edit, its target's tokens and their weight, or its divergence
        essence = np.concatenate([np.arange(len(members)) == len(members) - 1 for members in texts])
        order = self.cone.order
        run_goal = np.array([goal for goal, _ in edits])[of]
        targets: list[int] = []
        shares: list[int] = []
        owner: list[int] = []
        divergent: list[tuple[int, int, int]] = []
        reference: list[int] = []
        row = 0
        for run in order:
            goal = goals[run_goal[run]]
            if essence[run]:
                divergent.append((row, of[run], run_goal[run]))
                row += 1
                continue
            target = goal.targets[members[run] - goal.contexts[0]]
            tokens = len(target)
            targets += target
            shares += [tokens * len(goal.contexts)] * tokens
            owner += [of[run]] * tokens
            reference += range(row, row + tokens)
            row += tokens
        erases = [goals[goal].erases for goal, _ in edits]
        columns = (targets, reference, owner, shares, erases, *zip(*divergent, strict=True))
        sent, self.read, self.owner, parts, erasing, *last = send(tuple(map(np.array, columns)), search.layers.device)
        self.divergent, self.divergent_owner, self.reference = last
        self.targets, self.weights, self.erases = sent.long(), parts.double().reciprocal(), erasing.bool()

    def evaluate(self, delta: Tensor) -> tuple[np.ndarray, Tensor]:
        """The loss (E,) of each edit, and its gradient with respect to the vectors delta (E, hidden)."""
        hparams, size = self.search.hparams, self.size
        leaf = delta.detach().requires_grad_()
        with torch.enable_grad():
            states = self.cone.read_out(lambda block, layer, join: self.search.joining(block, layer, join, leaf))
            readout = self.search.layers.readout()
            log_p = readout.log_probability(states.index_select(0, self.read), self.targets)
            none = torch.zeros(self.count, dtype=torch.float64, device=log_p.device)
            nll = none.index_add(0, self.owner, -log_p * self.weights)
            kl = readout.divergence(states.index_select(0, self.divergent), self.search.unedited.log_p, self.reference)
            decay = hparams.weight_decay * leaf.norm(dim=1) / size.square()
            loss = torch.where(self.erases, torch.exp(-nll), nll) + decay
            # where nothing is added nothing diverges: rounding must not become a direction, which Adam would magnify
            kl = kl * (delta != 0).any(1)[self.divergent_owner]
            loss = loss + hparams.kl_factor * none.index_add(0, self.divergent_owner, kl)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        missed = self.erases.to(none.dtype)  # what is erased is never likely enough
        if hparams.stops_after is not None:
            likeliest = readout.most_likely(states.detach().index_select(0, self.read))
            missed = missed.index_add(0, self.owner, (likeliest != self.targets).to(missed.dtype))
        losses, misses = (tensor.numpy() for tensor in fetch(loss.detach(), missed).wait())
        self.reached = misses == 0
        return losses, gradient
