"""Computes units of a sweep, and writes the tables of each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from causalcone.engine.errors import CausalconeError
from causalcone.engine.facts import Fact
from causalcone.runners.inputs.fingerprints import model_fingerprint
from causalcone.runners.sweep.inputs.resources import Resources
from causalcone.runners.sweep.inputs.settings import Sweep
from causalcone.runners.sweep.inputs.units import Unit
from causalcone.runners.sweep.stages import stages_of


@dataclass(frozen=True)
class ModelInfo:
    """A loaded model as the driver knows it. fingerprint: changes with the weights."""

    model_type: str
    depth: int
    heads: int
    dtype: str
    device: str
    fingerprint: str


class Worker(Resources):
    """Computes units, one at a time."""

    def __init__(self, sweep: Sweep, place: str) -> None:
        super().__init__(sweep, place)
        self.stages = stages_of(sweep)

    def model_info(self) -> ModelInfo:
        session = self.session
        return ModelInfo(
            model_type=session.model.config.model_type,
            depth=session.sizes.depth,
            heads=session.sizes.heads,
            dtype=str(session.dtype).removeprefix("torch."),
            device=str(session.device),
            fingerprint=model_fingerprint(session.architecture),
        )

    def bad_facts(self, facts: Sequence[Fact]) -> list[tuple[str, str]]:
        """Facts that some stage cannot use, by id, with the reason; nothing is computed."""
        checks = [check for stage in self.stages.values() if (check := stage.fact_check(self)) is not None]
        bad = []
        for fact in facts:
            try:
                for check in checks:
                    check(fact)
            except CausalconeError as error:
                bad.append((fact.id, str(error)))
        return bad

    def run(self, unit: Unit) -> float:
        """Compute a unit and write its files; the seconds that it took."""
        started = time.monotonic()
<<<<<<< HEAD
        tables = self.stages[unit.stage].compute(unit, self)
=======
        {
            units.FILTER: self._filter,
            units.NOISE: self._noise,
            units.CONTEXTS: self._contexts,
            units.MOMENTS: self._moments,
            units.TRACE: self._trace,
            units.SEVER: self._sever,
            units.ZERO: self._zero,
            units.GRADIENTS: self._gradients,
            units.EDIT: self._edit,
        }[unit.stage](unit, _Writing(self, unit, started))
        return time.monotonic() - started

    @cached_property
    def tracer(self) -> Tracer:
        sweep = self.sweep
        memory = None if sweep.memory is None else str(sweep.memory)
        choice = PassOptions(
            model=sweep.model, dtype=sweep.dtype, device=sweep.device, memory=memory, kernels=sweep.kernels,
            tf32=sweep.tf32,
        )  # fmt: skip
        return Tracer.on(open_session(choice))

    @cached_property
    def facts(self) -> list[Fact]:
        return facts_of(self.store.read_table(FACTS))

    @cached_property
    def _level(self) -> float:
        return float(self.store.read_json(units.PREPARED[units.NOISE])["sigma"])

    @cached_property
    def _references(self) -> ReferenceTexts | None:
        edit = self.sweep.edit
        return None if edit is None or edit.references is None else load_reference_texts(edit.references_path())

    @cached_property
    def _editor(self) -> Editor:
        session, sweep, store = self.tracer.session, self.sweep, self.store
        moments = contexts = None
        if moment_layers(sweep, session.sizes.depth):
            with store.as_file(units.PREPARED[units.MOMENTS]) as file:
                moments = Moments.load(str(file)).with_ridge(sweep.moments.ridge)
        if sweep.edit is not None and sweep.plan(sweep.edit.problems[0]).of_contexts:
            contexts = Contexts(**store.read_json(units.PREPARED[units.CONTEXTS]))
        noise = store.read_json(units.PREPARED[units.NOISE])
        return Editor.on(session, moments, contexts, None if noise is None else noise["sigma"], sweep.seed)

    # --- what is prepared once ---

    def _filter(self, unit: Unit, writing: _Writing) -> None:
        session, sizes = self.tracer.session, self.tracer.session.sizes
        facts = self._facts(unit)
        encoded = [encode(fact, session.tokenizer, "label", sizes.vocabulary, sizes.positions) for fact in facts]
        said: Sequence[str | None] = [None] * len(facts)
        if self.sweep.filter.completes:
            said = completions(session, encoded)
        right = [None if text is None else completes(fact, text) for fact, text in zip(facts, said, strict=True)]
        first: Sequence[bool | None] = [None] * len(facts)
        if self.sweep.filter.argmax:
            likeliest = completions(session, encoded, 1)
            first = [said.strip() == fact.target_true.strip() for fact, said in zip(facts, likeliest, strict=True)]
        p = answer_probabilities(session, encoded)
        columns = [[fact.id for fact in facts], said, right, first, p]
        writing.tables(filter=pa.table(columns, schema=FILTER_SCHEMA))

    def _noise(self, unit: Unit, writing: _Writing) -> None:
        """The level of noise is that of all facts that go on from the filter."""
        table = self.store.read_table(FACTS)
        known = [self.facts[place] for place in chosen(self.sweep, table).known]
        level = self.tracer.noise_level(known, self.sweep.noise.sigma) if known else 0.0
        self.store.write_json(unit.files[0], {"sigma": level, "given": self.sweep.noise.sigma, "facts": len(known)})

    def _contexts(self, unit: Unit, writing: _Writing) -> None:
        given = self.sweep.contexts
        sampled = given is None
        contexts = sample_contexts(self.tracer.session, self.sweep.seed) if sampled else read_contexts(Path(str(given)))
        self.store.write_json(unit.files[0], asdict(contexts))

    def _moments(self, unit: Unit, writing: _Writing) -> None:
        """Collected over what texts there are, going on where an earlier collection ended; or those of a file."""
        session, choice, sweep = self.tracer.session, self.sweep.moments, self.sweep
        layers = moment_layers(sweep, session.sizes.depth)
        if choice.file is not None:
            moments = Moments.load(choice.file_path(), layers)
            moments.check(session.architecture, layers)
        else:
            texts = open_texts(
                TextOptions(
                    texts=choice.texts, dataset=choice.dataset, dataset_config=choice.dataset_config,
                    split=choice.split, column=choice.column,
                )
            )  # fmt: skip
            resume = None if self.store.local is None else str(self.store.local / "moments.partial")
            moments = Moments(*collect(session, texts.texts, layers, choice.tokens, source=texts.source, resume=resume))
        for layer in layers:  # what cannot be inverted is to be told now, not of every edit
            moments.with_ridge(choice.ridge).solve(layer, moments.matrix(layer)[:, :1].to(session.device))
        with TemporaryDirectory() as folder:
            file = Path(folder) / unit.files[0]
            moments.save(file)
            self.store.put(unit.files[0], file)
        self.store.delete("moments.partial")

    # --- localization ---

    def _trace(self, unit: Unit, writing: _Writing) -> None:
        own, noise = self.sweep.trace, self.sweep.noise
        assert own is not None
        batches = self.tracer.stream(
            self._facts(unit), own.states, tokens=own.tokens, target=own.target,
            samples=noise.samples, sigma=self._level, seed=noise.seed,
        )  # fmt: skip
        writing.tables(traces=pa.Table.from_batches(list(batches), schema=TRACE_SCHEMA))

    def _sever(self, unit: Unit, writing: _Writing) -> None:
        own, noise = self.sweep.sever, self.sweep.noise
        assert own is not None
        batches = self.tracer.stream(
            self._facts(unit), (("hidden", 1),), tokens=own.tokens, target=own.target,
            sever=unit.group.removeprefix("sever_"), compat=self.sweep.compat,
            samples=noise.samples, sigma=self._level, seed=noise.seed,
        )  # fmt: skip
        writing.tables(traces=pa.Table.from_batches(list(batches), schema=TRACE_SCHEMA))

    def _zero(self, unit: Unit, writing: _Writing) -> None:
        own = self.sweep.zero
        assert own is not None
        batches = self.tracer.stream_zero(self._facts(unit), own.states, target=own.target, tokens=own.tokens)
        writing.tables(traces=pa.Table.from_batches(list(batches), schema=TRACE_SCHEMA))

    def _gradients(self, unit: Unit, writing: _Writing) -> None:
        own = self.sweep.gradients
        assert own is not None
        batches = self.tracer.stream_integrated_gradients(
            self._facts(unit), own.kinds, steps=own.steps, target=own.target, tokens=own.tokens
        )
        writing.tables(gradients=pa.Table.from_batches(list(batches), schema=GRADIENT_SCHEMA))

    # --- editing ---

    def _edit(self, unit: Unit, writing: _Writing) -> None:
        """Make edits batch by batch, score them, and let them go."""
        edit, problem = self.sweep.edit, str(unit.problem)
        assert edit is not None
        assert unit.setting is not None
        plan, editor = self.sweep.plan(problem), self._editor
        setting = plan.settings[unit.setting]
        layers = edit_layers(self.sweep, problem, editor.session.sizes.depth)
        with _reasons() as reasons:
            requests = editor.requests(
                self._facts(unit), problem, filtered=False, on_error="skip", compat=self.sweep.compat
            )
        writing.left_out(requests, reasons)
        generation = edit.generates(problem)
        asked = {"essence": edit.essence, "accuracy": edit.accuracy, "generation": generation}
        references = self._references if generation else None
        edits, probes, metrics = [], [], []
        for batch in editor.batches(requests, setting.method, layers, setting.window, setting.hparams):
            scores = editor.evaluate(batch, **asked, references=references)
            edits.append(edit_batch(scores.edits))
            probes.append(scores.probes)
            metrics.append(scores.metrics)
            del batch, scores  # changes of weights, before the next are made
        writing.tables(
            probes=pa.Table.from_batches(probes, schema=PROBE_SCHEMA),
            metrics=pa.Table.from_batches(metrics, schema=METRIC_SCHEMA),
            edits=pa.Table.from_batches(edits, schema=EDIT_SCHEMA),
        )

    def _facts(self, unit: Unit) -> list[Fact]:
        return [self.facts[place] for place in unit.facts]


@dataclass(frozen=True)
class _Writing:
    """Writes the files of a unit."""

    worker: Worker
    unit: Unit
    started: float

    def tables(self, **tables: pa.Table) -> None:
        """Write all tables, in the order in which they are to be there."""
        unit, store = self.unit, self.worker.store
>>>>>>> main
        notes = {
            "unit": unit.name,
            "configuration": self.sweep.hash,
            "items": unit.items,
            "seconds": round(time.monotonic() - started, 3),
        }
        for name in unit.tables:
            self.store.write_table(unit.file(name), tables[name], notes)
        return time.monotonic() - started
