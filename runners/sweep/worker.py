"""Carries out units of a sweep: holds the model, and writes what each unit gives."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from causalcone.engine.edit.editor import Editor
from causalcone.engine.edit.moments.collect import collect
from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.edit.requests.problems import make_requests
from causalcone.engine.edit.requests.requests import ERROR_INJECTION, FACT_AMPLIFICATION
from causalcone.engine.edit.scoring.tables import edit_batch
from causalcone.engine.edit.texts.contexts import Contexts, sample_contexts
from causalcone.engine.edit.texts.recall import COMPLETION_TOKENS, answer_probabilities, completes, completions
from causalcone.engine.errors import CausalconeError
from causalcone.engine.facts import Fact, Skipped, encode
from causalcone.engine.localize.tracer import Tracer
from causalcone.engine.schemas import (
    EDIT_SCHEMA,
    FILTER_SCHEMA,
    GRADIENT_SCHEMA,
    LEFT_OUT_SCHEMA,
    METRIC_SCHEMA,
    PROBE_SCHEMA,
    TRACE_SCHEMA,
)
from causalcone.runners.edits.checks import EditChecks
from causalcone.runners.edits.settings import read_contexts
from causalcone.runners.inputs.fingerprints import model_fingerprint
from causalcone.runners.inputs.inputs import open_session
from causalcone.runners.inputs.reference_texts import ReferenceTexts, load_reference_texts
from causalcone.runners.inputs.running_text import open_texts
from causalcone.runners.options import PassOptions, ScoringOptions, TextOptions
from causalcone.runners.results.store import Store
from causalcone.runners.sweep import units
from causalcone.runners.sweep.config import Sweep
from causalcone.runners.sweep.facts_table import FACTS, chosen, facts_of
from causalcone.runners.sweep.units import Unit, edit_layers, moment_layers


@dataclass(frozen=True)
class Description:
    """What the driver has to know of a model that a worker has loaded. fingerprint: changes with its weights."""

    model_type: str
    depth: int
    heads: int
    dtype: str
    device: str
    fingerprint: str


class Worker:
    """Computes units, one at a time. The model is read at first use."""

    def __init__(self, sweep: Sweep, place: str) -> None:
        self.sweep, self.store = sweep, Store.open(place)

    def describe(self) -> Description:
        session = self.tracer.session
        return Description(
            session.model.config.model_type, session.sizes.depth, session.sizes.heads,
            str(session.dtype).removeprefix("torch."), str(session.device), model_fingerprint(session.architecture),
        )  # fmt: skip

    def bad_facts(self, facts: Sequence[Fact]) -> list[tuple[str, str]]:
        """Facts that some part of the sweep cannot use, by id, with the reason; nothing is computed."""
        session, sizes = self.tracer.session, self.tracer.session.sizes
        edit = self.sweep.edit
        # error injection asks more of a fact than the other problems, which ask the same
        problem = ERROR_INJECTION if edit is not None and ERROR_INJECTION in edit.problems else FACT_AMPLIFICATION
        checks = None if edit is None else self._checks(edit.problems[0])
        editor = Editor.on(session)
        bad = []
        for fact in facts:
            try:
                encode(fact, session.tokenizer, "label", sizes.vocabulary, sizes.positions + 1 - self._positions)
                if checks is not None:
                    checks(*editor.requests([fact], problem, filtered=False))
            except CausalconeError as error:
                bad.append((fact.id, str(error)))
        return bad

    def _checks(self, problem: str) -> EditChecks:
        edit = self.sweep.edit
        assert edit is not None
        generation = any(map(edit.generates, edit.problems))
        scoring = ScoringOptions(essence=edit.essence, generation=generation)
        references = self._references if generation else None
        return EditChecks(self.tracer.session, self.sweep.plan(problem), None, scoring, references)

    @property
    def _positions(self) -> int:
        """Positions that have to be left behind a prompt: for what the model says, and for one token at least."""
        return COMPLETION_TOKENS if self.sweep.filter.completes else 1

    def run(self, unit: Unit) -> float:
        """Compute a unit and write its files; the seconds that it took."""
        started = time.monotonic()
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
            sever=unit.group.removeprefix("sever_"), compat=self.sweep.compat,  # type: ignore[arg-type]
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
        requests, skipped, _ = make_requests(
            editor.session, self._facts(unit), problem, editor.sigma,
            filtered=False, on_error="skip", compat=self.sweep.compat, seed=editor.seed,
        )  # fmt: skip
        writing.left_out(skipped)
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
        notes = {
            "unit": unit.name,
            "configuration": self.worker.sweep.hash,
            "items": unit.items,
            "seconds": round(time.monotonic() - self.started, 3),
        }
        for name in units.TABLES[unit.stage]:
            store.write_table(unit.file(name), tables[name], notes)

    def left_out(self, skipped: Sequence[Skipped]) -> None:
        """Note the facts that no request could be made of."""
        rows = [{"fact_id": each.fact_id, "unit": self.unit.name, "reason": each.reason} for each in skipped]
        if rows:
            table = pa.Table.from_pylist(rows, schema=LEFT_OUT_SCHEMA)
            self.worker.store.write_table(self.unit.left_out, table, {"unit": self.unit.name})
