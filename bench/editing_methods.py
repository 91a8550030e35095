"""The methods of editing, as the naive way and the engine do them with the same facts, layers, contexts and moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import naive
import naive_editing
import torch
from editing_flops import Flops
from naive_editing import NaiveEdits
from torch import Tensor

from causalcone import Editor, Fact, Moments
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.methods.hparams import FinetuneHparams, Hparams, MemitHparams, RomeHparams
from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.texts.contexts import Contexts
from causalcone.engine.encoding import PromptEncoder
from causalcone.engine.models import read_architecture


@dataclass(frozen=True)
class Setup:
    """A model, the facts and layers that are edited in it, and what both ways are given: contexts, and second moments
    (inner, inner) by layer. memory: of the engine."""

    model: Any
    tokenizer: Any
    facts: Sequence[Fact]
    layers: Sequence[int]
    contexts: Contexts
    moments: Mapping[int, Tensor]
    memory: str | None = None

    @property
    def edits(self) -> int:
        return len(self.facts) * len(self.layers)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def encoder(self) -> Encoder:
        sizes = read_architecture(self.model).sizes
        return Encoder(PromptEncoder(self.tokenizer, sizes.vocabulary, sizes.positions), sizes)

    def editor(self) -> Editor:
        """One that knows nothing yet of the model and the moments."""
        # however few tokens the moments are of, their diagonal was raised until they can be inverted
        tokens = {layer: len(moment) for layer, moment in self.moments.items()}
        return Editor(self.model, self.tokenizer, Moments(self.moments, tokens), self.contexts, memory=self.memory)

    def requests(self, editor: Editor) -> list[Request]:
        """Every fact is edited, whatever the model knows of it."""
        return editor.requests(self.facts, filtered=False)


@dataclass(frozen=True)
class Method:
    """A method in a form worth measuring; ``name`` is the engine's. Without ``stop_loss`` both ways take all steps."""

    title: str
    naive_way: str
    name: str
    hparams: Hparams
    window: int = 1

    def measure_naive(self, setup: Setup, seeing: naive_editing.Seeing, limits: naive.Limits) -> NaiveEdits:
        study = setup.model, setup.tokenizer, setup.facts, setup.layers
        more: Any = {"hparams": self.hparams, "seeing": seeing, **limits}
        if self.name == "rome":
            return naive_editing.measure_rome(*study, setup.contexts.rome, setup.moments, **more)
        if self.name == "memit":
            given = setup.contexts.memit, setup.moments
            return naive_editing.measure_memit(*study, *given, window=self.window, **more)
        return naive_editing.measure_finetune(*study, window=self.window, **more)

    def batches(self, editor: Editor, requests: Sequence[Request], layers: Sequence[int]) -> Iterator[list[Edit]]:
        return editor.batches(requests, self.name, layers, self.window, self.hparams)

    def flops(self, setup: Setup, batch: Sequence[Edit]) -> int:
        """Of edits that the engine made together."""
        flops, steps = Flops(setup.encoder), self.hparams.steps
        if self.name == "rome":
            return flops.rome(batch, setup.contexts.rome, steps)
        if self.name == "memit":
            return flops.memit(batch, setup.contexts.memit, steps)
        return flops.finetune(batch, steps)

    def changes_nothing(self, setup: Setup, edit: Edit) -> bool:
        """Whether nothing leads from the vector to the target: in the last layer, where the prompt goes on behind the
        subject. The change is zero then, but for rounding."""
        encoder, last = setup.encoder, setup.encoder.sizes.depth - 1
        if self.name == "finetune" or last not in Window.around(edit.layer, edit.window, last + 1).layers:
            return False
        prompted = encoder.prompted(edit.request, edit.request.fact.prompt)
        return prompted.lookup < len(prompted.text) - 1

    def warm_up(self, setup: Setup) -> None:
        """Two steps on the shortest prompt, at one layer."""
        editor = setup.editor()
        shortest = min(setup.requests(editor), key=lambda request: len(request.fact.text))
        brief = replace(self, hparams=replace(self.hparams, steps=2))
        for _ in brief.batches(editor, [shortest], setup.layers[:1]):
            pass


METHODS = {
    "rome": Method("ROME", naive_editing.ROME, "rome", RomeHparams(stop_loss=None)),
    "memit": Method("MEMIT, window 5", naive_editing.MEMIT, "memit", MemitHparams(stop_loss=None), window=5),
    "finetune": Method("FT-1", naive_editing.FINETUNE, "finetune", FinetuneHparams(stop_loss=None)),
    "finetune5": Method("FT-5", naive_editing.FINETUNE, "finetune", FinetuneHparams(stop_loss=None), window=5),
}
