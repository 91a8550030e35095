"""``Editor``: edits facts in a transformers model, at many layers at once, and scores the edited models."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch

from causalcone.engine.compute import Compute
from causalcone.engine.edit.methods.batching import layers_and_batching
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.methods.finetune import FINETUNE
from causalcone.engine.edit.methods.hparams import FinetuneHparams, Hparams, MemitHparams, RomeHparams
from causalcone.engine.edit.methods.memit import MEMIT, MEMIT_JOINT, JointEdit, JointMemit
from causalcone.engine.edit.methods.method import EditableModel, Method
from causalcone.engine.edit.methods.registry import method_named
from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.edit.requests.problems import FilteredFacts, make_requests
from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.scoring.generation_metrics import Generation, References, ReferenceScorer
from causalcone.engine.edit.scoring.metrics import Row, metrics_of
from causalcone.engine.edit.scoring.probes import ProbeSet, probes_of
from causalcone.engine.edit.scoring.sampled_texts import essence_texts
from causalcone.engine.edit.scoring.scoring import EditScorer, Scored, check_edits, checked_scores
from causalcone.engine.edit.scoring.tables import metric_batch, probe_batch
from causalcone.engine.edit.texts.contexts import Contexts, check_contexts, sample_contexts
from causalcone.engine.errors import ExperimentError
from causalcone.engine.facts import Fact, OnError, SkippedFacts, encode
from causalcone.engine.localize.options import DEFAULT_SIGMA
from causalcone.engine.noise import parse_sigma
from causalcone.engine.run.loading import open_session
from causalcone.engine.run.session import Session
from causalcone.engine.schemas import PROBE_SCHEMA
from causalcone.kernels.precision import each_within

LayerChoice = str | Sequence[int | Sequence[int]]


@dataclass(frozen=True)
class Scores:
    """Scores of edits: the edits, of which those that give no finite probabilities count as failed; probes, with the
    columns of ``PROBE_SCHEMA``; metrics, with those of ``METRIC_SCHEMA``."""

    edits: list[Edit]
    probes: pa.RecordBatch
    metrics: pa.RecordBatch


class Editor:
    """Edits facts in a transformers model, whose weights stay as they are: edits are changes of weights (``Delta``).

    model, tokenizer, dtype, device, memory, tf32: as of ``Tracer``. kernels: likewise, but attention is torch's always,
    since most of it needs gradients. moments: second moments of the layers to be edited (``Moments``), which ROME and
    MEMIT need. contexts: texts put before prompts (``Contexts``, or one list for both methods); sampled from the model
    by default. sigma: the noise level of Tracing Reversal and Fact Forcing, a number or ``"<k>sd"`` for k standard
    deviations of the subjects' embeddings; ``"3sd"`` by default. seed: of everything that is sampled.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        moments: Moments | None = None,
        contexts: Contexts | Sequence[str] | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        memory: int | str | None = None,
        sigma: float | str | None = None,
        seed: int = 0,
        kernels: str | None = None,
        tf32: bool = False,
    ) -> None:
        self._open(
            Session(model, tokenizer, Compute.of(dtype, device, memory, kernels, tf32)), moments, contexts, sigma, seed
        )

    @classmethod
    def on(
        cls,
        session: Session,
        moments: Moments | None = None,
        contexts: Contexts | Sequence[str] | None = None,
        sigma: float | str | None = None,
        seed: int = 0,
    ) -> Editor:
        """An editor on a session, which others may share."""
        editor = cls.__new__(cls)
        editor._open(session, moments, contexts, sigma, seed)
        return editor

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        moments: Moments | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        memory: int | str | None = None,
        **options: Any,
    ) -> Editor:
        """An editor for a model folder or hub id; its weights are kept in ``dtype``, as saved by default."""
        kernels, tf32 = options.pop("kernels", None), options.pop("tf32", False)
        return cls.on(open_session(path, Compute.of(dtype, device, memory, kernels, tf32)), moments, **options)

    def _open(
        self,
        session: Session,
        moments: Moments | None,
        contexts: Contexts | Sequence[str] | None,
        sigma: float | str | None,
        seed: int,
    ) -> None:
        self.session, self.moments, self.seed = session, moments, seed
        self.sigma = DEFAULT_SIGMA if sigma is None else sigma
        parse_sigma(self.sigma)
        if contexts is not None:
            texts = contexts if isinstance(contexts, Contexts) else Contexts(*2 * (check_contexts(contexts),))
            self.__dict__["contexts"] = texts
        self._encoder = Encoder(session.tokenizer, session.sizes)
        self._essence: dict[tuple[object, ...], list[str]] = {}
        self._scorer: tuple[References, ReferenceScorer] | None = None

    @cached_property
    def contexts(self) -> Contexts:
        """The texts that ROME and MEMIT put before prompts; those given, or sampled once from the model."""
        return sample_contexts(self.session, self.seed)

    def requests(
        self,
        facts: Iterable[Fact],
        problem: str = "error_injection",
        *,
        filtered: bool = True,
        on_error: OnError = "raise",
        compat: str | None = None,
    ) -> list[Request]:
        """The requests that a problem (Hase et al. 2023; docs/editing.md, "Problems") makes of facts.

        Args:
            facts: Facts, with the targets that the problem needs.
            problem: ``"error_injection"``, ``"tracing_reversal"``, ``"fact_erasure"``, ``"fact_amplification"`` or
                ``"fact_forcing"``.
            filtered: Leave out facts that the model does not complete, and warn ``FilteredFacts``.
            on_error: ``"skip"`` leaves out facts that cannot be used, and warns ``SkippedFacts``.
            compat: ``"published"`` poses problems as the published code does.

        Raises:
            FactError: A fact cannot be used; the message names it and the fix.
            ExperimentError: An argument cannot be used.
        """
        requests, skipped, unposed = make_requests(
            self.session, facts, problem, self.sigma, filtered=filtered, on_error=on_error, compat=compat,
            seed=self.seed,
        )  # fmt: skip
        if unposed:
            warnings.warn(FilteredFacts(problem, [fact.reason for fact in unposed]), stacklevel=2)
        if skipped:
            warnings.warn(SkippedFacts([fact.reason for fact in skipped]), stacklevel=2)
        return requests

    def rome(self, requests: Sequence[Request], layers: LayerChoice, hparams: RomeHparams | None = None) -> list[Edit]:
        """ROME (Meng et al. 2022): an edit of each request at each layer.

        Args:
            requests: Requests, as ``Editor.requests`` makes them.
            layers: Layers by number from 0, or ``"all"``.
            hparams: Hyperparameters; the defaults if None.

        Returns:
            The edits, request by request. Edits that fail carry the reason; the others are made all the same.

        Raises:
            ExperimentError: A layer has no moments, or the moments are another model's.
        """
        return _flat(self.batches(requests, "rome", layers, hparams=hparams))

    def memit(
        self,
        requests: Sequence[Request],
        layers: LayerChoice,
        window: int = MEMIT.size(None),
        hparams: MemitHparams | None = None,
        *,
        joint: bool = False,
    ) -> list[Edit]:
        """MEMIT (Meng et al. 2023): an edit of each request in each window of layers.

        Args:
            requests: Requests, as ``Editor.requests`` makes them.
            layers: The windows' centres, from 0, or ``"all"``; or lists of layers, one for each window.
            window: Layers in a window.
            hparams: Hyperparameters; the defaults if None.
            joint: All requests together make one change of each window's weights, which their edits share.

        Returns:
            The edits, request by request; joint ones window by window.

        Raises:
            ExperimentError: A layer has no moments, or the moments are another model's.
        """
        return _flat(self.batches(requests, MEMIT_JOINT.name if joint else MEMIT.name, layers, window, hparams))

    def memit_joint(
        self, requests: Sequence[Request], layers: Sequence[int], hparams: MemitHparams | None = None
    ) -> JointEdit:
        """MEMIT of all requests at once: one change of the layers.

        Args:
            requests: Requests, as ``Editor.requests`` makes them; at least one.
            layers: The edited layers, in order.
            hparams: Hyperparameters; the defaults if None.

        Returns:
            The change of weights. Its ``edits()`` can be scored; ``memit(..., joint=True)`` gives these.

        Raises:
            ExperimentError: There are no requests, or a layer has no moments.
        """
        listed = _listed(requests)
        if not listed:
            raise ExperimentError("there are no requests; give at least one")
        windows = MEMIT_JOINT.windows([tuple(layers)], None, self.session.sizes.depth)
        checked: Any = MEMIT_JOINT.checked(hparams)
        self._prepare(MEMIT_JOINT, listed, windows)
        with self.session.computing():
            return JointMemit(self._model(MEMIT_JOINT), checked).joint(listed, windows[0])

    def finetune(
        self,
        requests: Sequence[Request],
        layers: LayerChoice,
        window: int = FINETUNE.size(None),
        hparams: FinetuneHparams | None = None,
    ) -> list[Edit]:
        """Constrained fine-tuning (Zhu et al. 2020; FT-1, FT-5) of the down-projections of each window of layers.

        Args:
            requests: Requests, as ``Editor.requests`` makes them.
            layers: The windows' centres, from 0, or ``"all"``; or lists of layers, one for each window.
            window: Layers in a window.
            hparams: Hyperparameters; the defaults if None.

        Returns:
            The edits, request by request, each with a dense change; ``run`` scores and drops them batch by batch.
        """
        return _flat(self.batches(requests, "finetune", layers, window, hparams))

    def batches(
        self,
        requests: Sequence[Request],
        method: str,
        layers: LayerChoice,
        window: int | None = None,
        hparams: Hparams | None = None,
    ) -> Iterator[list[Edit]]:
        """The edits of a method, in batches of those that are made together, each made when it is asked for.

        Args:
            requests: Requests, as ``Editor.requests`` makes them.
            method: ``"rome"``, ``"memit"``, ``"memit_joint"``, ``"finetune"`` or a registered method's name.
            layers: The layers, or the windows' centres, from 0, or ``"all"``; or lists of layers.
            window: Layers in a window; the method's default if None.
            hparams: Hyperparameters of the method; the defaults if None.

        Raises:
            ExperimentError: An argument, or the editor's moments, cannot be used; this is checked at once.
        """
        definition, listed = method_named(method), _listed(requests)
        windows = definition.windows(layers, window, self.session.sizes.depth)
        checked = definition.checked(hparams)
        self._prepare(definition, listed, windows)
        batches = definition.build(self._model(definition), checked).batches(listed, windows) if listed else iter(())
        return each_within(self.session.computing, batches)

    def run(
        self,
        requests: Sequence[Request],
        method: str,
        layers: LayerChoice,
        window: int | None = None,
        hparams: Hparams | None = None,
    ) -> Iterator[tuple[Edit, pa.RecordBatch]]:
        """Make edits and score them, batch by batch: each edit with its probes. One batch is held at a time."""
        batches = self.batches(requests, method, layers, window, hparams)
        while batch := next(batches, None):
            for scored in self._scored(batch, False, False):
                yield scored.edit, probe_batch([scored])
                del scored
            del batch

    def score(self, edits: Sequence[Edit]) -> pa.Table:
        """Probabilities of both targets on all prompts of the edits' facts, before and after each edit: a row for every
        edit and prompt, with the columns of ``PROBE_SCHEMA``. No weight is written."""
        return pa.Table.from_batches([self.evaluate(edits).probes], schema=PROBE_SCHEMA)

    def evaluate(
        self,
        edits: Sequence[Edit],
        *,
        essence: bool = False,
        accuracy: bool = False,
        generation: bool = False,
        references: References | None = None,
    ) -> Scores:
        """Probes and metrics of edits (docs/editing.md, "Scores").

        Args:
            edits: Edits of one method or several; facts without evaluation prompts have rewrite probes only.
            essence: Measure the perplexity of five texts about each subject, sampled from the unedited model.
            accuracy: Measure the share of the targets' tokens that are most likely.
            generation: Measure the entropy of texts of the edited models.
            references: Measure also how alike these texts are to texts about the new target.
        """
        results = list(self._scored(edits, essence, accuracy))
        rows: list[Row] = [row for scored in results for row in metrics_of(scored, accuracy)]
        final = [scored.edit for scored in results]
        if generation or references is not None:
            rows += Generation(self.session, self.seed, references, self._scorer_of(references)).rows(final)
        return Scores(final, probe_batch(results), metric_batch(rows))

    def _scored(self, edits: Sequence[Edit], essence: bool, accuracy: bool) -> Iterator[Scored]:
        if not edits:
            return
        self._verify(edits[0].request)
        check_edits(edits, self.session.sizes)
        texts = self._essence_of([edit.request.fact for edit in edits]) if essence else {}

        def edit_probes(edit: Edit) -> ProbeSet:
            return probes_of(edit.request, self._encoder, texts.get(edit.fact_id, ()))

        scored = EditScorer(*layers_and_batching(self.session), edit_probes, accuracy).score(edits)
        yield from each_within(self.session.computing, map(checked_scores, scored))

    def _essence_of(self, facts: Iterable[Fact]) -> dict[str, list[str]]:
        """The essence texts of facts, by their ids: sampled once from the model as it is."""
        of_weights = self.session.versions()
        keys = {fact.id: (fact.id, fact.subject, of_weights) for fact in facts}
        new = {fact.id: fact for fact in facts if keys[fact.id] not in self._essence}
        sampled = essence_texts(self.session, new.values(), self.seed)
        self._essence.update({keys[name]: texts for name, texts in sampled.items()})
        return {name: self._essence[key] for name, key in keys.items()}

    def _scorer_of(self, references: References | None) -> ReferenceScorer | None:
        """Words weighed by the references, once for as long as these are asked for."""
        if references is None:
            return None
        if self._scorer is None or self._scorer[0] is not references:
            self._scorer = references, ReferenceScorer(references.corpus)
        return self._scorer[1]

    def _prepare(self, method: Method, requests: Sequence[Request], windows: Sequence[Window]) -> None:
        """Check requests and moments before anything is computed."""
        for request in requests:
            if not isinstance(request, Request):
                raise ExperimentError(f"{request!r} is not a request; make them with Editor.requests(facts, problem)")
            prompt = self._encoder.prompted(request, request.fact.prompt)
            self._encoder.followed(request, prompt.text, request.target)
        if method.needs_moments:
            if self.moments is None:
                raise ExperimentError(
                    f"{method.name} needs second moments: Editor(model, tokenizer, moments=Moments.collect(...))"
                )
            layers = sorted({layer for window in windows for layer in window.layers})
            self.moments.check(self.session.architecture, layers)
        if requests:
            self._verify(requests[0])

    def _verify(self, request: Request) -> None:
        sizes = self.session.sizes
        prompt = encode(request.fact, self.session.tokenizer, "argmax", sizes.vocabulary, sizes.positions).prompt
        self.session.verify(prompt)

    def _model(self, method: Method) -> EditableModel:
        """The model made ready for a method."""
        layers, batching = layers_and_batching(self.session)
        contexts = () if method.contexts is None else getattr(self.contexts, method.contexts)
        return EditableModel(
            layers=layers, encoder=self._encoder, batching=batching, contexts=contexts, moments=self.moments
        )


def _listed(requests: Any) -> list[Request]:
    if isinstance(requests, Request) or not isinstance(requests, Iterable):
        raise ExperimentError(f"requests are {requests!r}; give a list, as Editor.requests makes it")
    return list(requests)


def _flat(batches: Iterable[list[Edit]]) -> list[Edit]:
    return [edit for batch in batches for edit in batch]
