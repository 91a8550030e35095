"""UltraEdit by its equations: full forwards of an unmodified model, hooks for what goes into its projections and for
the gradients of what comes out, statistics over all tokens that were ever seen, and dense solves.

A turn changes the model's own weights, so that the next one starts from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from oracles.editing import Task, about_subject, down
from oracles.model import precision, sites

UP = {"gpt2": "mlp.c_fc", "gptj": "mlp.fc_in"}
EPSILON = 2.0**-23


def projection(model: nn.Module, layer: int, name: str) -> nn.Module:
    """A projection of a layer's MLP: down, gate or up."""
    if name == "down":
        return down(model, layer)
    path = UP.get(model.config.model_type, f"mlp.{name}_proj")
    return sites(model)[layer]["hidden"].module.get_submodule(path)


class UltraEdit:
    """A sequence of turns on a model. ``places``: the layers and names of its projections."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, places: Sequence[tuple[int, str]], lr: float, ridge: float, size: int
    ) -> None:
        self.model, self.tokenizer, self.places = model, tokenizer, places
        self.lr, self.ridge, self.size = lr, ridge, size
        self.known: dict[tuple[int, int], list[Tensor]] = {}

    def turn(self, tasks: Sequence[Task]) -> dict[tuple[int, str], Tensor]:
        """What is added to each projection's weight (out, in)."""
        with precision(self.model, lift=True):
            collected: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {place: [] for place in self.places}
            for start in range(0, len(tasks), self.size):
                self._minibatch(tasks[start : start + self.size], collected)
        rows = {place: [torch.cat(parts) for parts in zip(*pairs, strict=True)] for place, pairs in collected.items()}
        for keys, slopes in rows.values():
            self.known.setdefault((keys.shape[1], slopes.shape[1]), []).append(torch.cat([keys, slopes], 1))
        changes = {place: self._change(keys, slopes) for place, (keys, slopes) in rows.items()}
        for (layer, name), change in changes.items():
            module = projection(self.model, layer, name)
            module.weight.detach().add_(change if isinstance(module, nn.Linear) else change.T)
        return changes

    def _minibatch(self, tasks: Sequence[Task], collected: dict) -> None:
        """One loss over all tokens of the targets, and one way back."""
        nll, tokens = [], sum(len(task.target) for task in tasks)
        seen: list[tuple[tuple[int, str], int, Tensor, Tensor]] = []
        for task in tasks:
            prompt = about_subject(self.model, self.tokenizer, task.fact, task.fact.prompt)
            ids = [*prompt.ids, *task.target[:-1]]
            with ExitStack() as stack:
                for place in self.places:

                    def keep(module, inputs, output, place=place, task=task):
                        output.retain_grad()
                        seen.append((place, len(task.target), inputs[0].detach(), output))

                    stack.callback(projection(self.model, *place).register_forward_hook(keep).remove)
                logits = self.model(torch.tensor([ids]), use_cache=False).logits[0].double()
            log_p = logits[len(prompt.ids) - 1 :].log_softmax(-1)[range(len(task.target)), list(task.target)].sum()
            nll.append(log_p.exp() if task.problem == "fact_erasure" else -log_p)
        (sum(nll) / tokens).backward()
        for place, count, entered, output in seen:
            width = output.shape[-1]
            last = entered.reshape(-1, entered.shape[-1])[-count:], output.grad.reshape(-1, width)[-count:]
            collected[place].append(tuple(part.double() for part in last))
        self.model.zero_grad()

    def _change(self, keys: Tensor, slopes: Tensor) -> Tensor:
        inner = keys.shape[1]
        every = torch.cat(self.known[inner, slopes.shape[1]])
        normal = (torch.cat([keys, slopes], 1) - every.mean(0)) / (every.std(0) + EPSILON)
        wanted = -self.lr * (normal[:, :inner] ** 2).sum(1, keepdim=True) * normal[:, inner:]
        return torch.linalg.solve(keys.T @ keys + self.ridge * torch.eye(inner).double(), keys.T @ wanted).T
