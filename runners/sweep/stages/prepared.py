"""The stages that prepare a file once for all others: "noise", "contexts" and "moments"."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import pyarrow as pa

from causalcone.engine.edit.moments.collect import TOKENS_PER_COMPONENT, collect
from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.edit.moments.sampled import TOKENS
from causalcone.engine.edit.runs.flops import Grown
from causalcone.engine.edit.texts.contexts import MEMIT_TOKENS, MEMIT_WORDS, ROME_TOKENS, sample_contexts
from causalcone.runners.edits.settings import read_contexts
from causalcone.runners.inputs.running_text import open_texts
from causalcone.runners.names import path_of
from causalcone.runners.show.forecast import USUAL_EFFICIENCY
from causalcone.runners.sweep.inputs.facts_table import FACTS, select
from causalcone.runners.sweep.inputs.resources import NOISE_FILE, Resources
from causalcone.runners.sweep.inputs.settings import Sweep
from causalcone.runners.sweep.inputs.units import Selection, Unit
from causalcone.runners.sweep.stages.counts import Counts
from causalcone.runners.sweep.stages.stage import Stage, StageCost, StageUnits

NOISE, CONTEXTS, MOMENTS = "noise", "contexts", "moments"
CONTEXTS_FILE, MOMENTS_FILE = "contexts.json", "moments.safetensors"

PARTIAL = "moments.partial"


class PreparedStage(Stage[Sequence[Stage]]):
    """One file; its options are the stages that need it."""

    file: ClassVar[str]
    item = "files"
    required = True

    def units(self, selection: Selection, depth: int) -> list[StageUnits]:
        return [StageUnits(self, self.title, (Unit(self.name, "", 0, (), 1, prepared=self.file),))]


class NoiseStage(PreparedStage):
    """The level of noise: that of all facts that go on from the filter."""

    name, title, file = NOISE, "level of noise", NOISE_FILE

    def compute(self, unit: Unit, resources: Resources) -> Mapping[str, pa.Table]:
        selection = select(self.sweep, resources.store.read_table(FACTS))
        known, sigma = [resources.facts[number] for number in selection.known], self.sweep.noise.sigma
        level = resources.tracer.noise_level(known, sigma) if known else 0.0
        resources.store.write_json(self.file, {"sigma": level, "given": sigma, "facts": len(known)})
        return {}


class ContextsStage(PreparedStage):
    """Texts put before prompts: those of a file, or drawn from the model."""

    name, title, file = CONTEXTS, "contexts", CONTEXTS_FILE

    def compute(self, unit: Unit, resources: Resources) -> Mapping[str, pa.Table]:
        file = self.sweep.contexts
        contexts = sample_contexts(resources.session, self.sweep.seed) if file is None else read_contexts(Path(file))
        resources.store.write_json(self.file, asdict(contexts))
        return {}

    def cost(self, units: StageUnits, counts: Counts) -> StageCost:
        if self.sweep.contexts is not None:
            return StageCost(units)
        lengths = (*ROME_TOKENS, *(MEMIT_TOKENS,) * len(MEMIT_WORDS))  # of which the first token is there
        return StageCost(units, counts.flops.decoding(Grown(len(lengths), len(lengths), sum(lengths) - len(lengths))))


class MomentsStage(PreparedStage):
    """Second moments of MLP keys: those of a file, or collected over running text."""

    name, title, file = MOMENTS, "second moments", MOMENTS_FILE
    efficiency = USUAL_EFFICIENCY

    def __init__(self, sweep: Sweep, options: Sequence[Stage]) -> None:
        super().__init__(sweep, options)
        self.settings = sweep.moments

    def layers(self, depth: int) -> list[int]:
        """The layers that any stage needs moments of."""
        return sorted({layer for stage in self.options for layer in stage.moment_layers(depth)})

    def compute(self, unit: Unit, resources: Resources) -> Mapping[str, pa.Table]:
        """Read them, or collect them over the texts, going on where an earlier collection ended."""
        session, settings, store = resources.session, self.settings, resources.store
        layers = self.layers(session.sizes.depth)
        if settings.file is not None:
            moments = Moments.load(path_of(settings.file, "moments"), layers)
            moments.check(session.architecture, layers)
        else:
            dataset = (settings.dataset, settings.dataset_config, settings.split, settings.column)
            texts = open_texts(settings.texts, *dataset)
            resume = None if store.local is None else str(store.local / PARTIAL)
            moments = Moments(
                *collect(session, texts.texts, layers, settings.tokens, source=texts.source, resume=resume)
            )
        for layer in layers:  # a matrix that cannot be inverted is an error now, not one of every edit
            moments.with_ridge(settings.ridge).solve(layer, moments.matrix(layer)[:, :1].to(session.device))
        with TemporaryDirectory() as folder:
            file = Path(folder) / self.file
            moments.save(file)
            store.put(self.file, file)
        store.delete(PARTIAL)
        return {}

    def cost(self, units: StageUnits, counts: Counts) -> StageCost:
        """Matrices are kept in float32, of float64 models in float64."""
        sizes, settings = counts.architecture.sizes, self.settings
        layers = self.layers(sizes.depth)
        size = len(layers) * sizes.inner**2 * (8 if self.sweep.dtype == "float64" else 4)
        if settings.file is not None:
            return StageCost(units, other_bytes=size)
        tokens = settings.tokens if isinstance(settings.tokens, int) else TOKENS_PER_COMPONENT * sizes.inner
        flops = counts.flops.moments(tokens, layers)
        if not settings.sources:  # the model writes the texts
            texts = math.ceil(tokens / TOKENS)
            flops += counts.flops.decoding(Grown(texts, texts, texts * TOKENS))
        return StageCost(units, flops, other_bytes=size)
