"""``Editor``: edits facts in a transformers model, at many layers at once, and scores the edited models."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Unpack

import numpy as np
import pyarrow as pa
import torch

from causalcone.engine.compute import Compute, Kernels
from causalcone.engine.edit.methods.batching import layers_and_batching
from causalcone.engine.edit.methods.closed_forms.memit import MEMIT, MEMIT_JOINT, Memit
from causalcone.engine.edit.methods.closed_forms.spread import JointEdit
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.methods.fine_tuning.finetune import FINETUNE
from causalcone.engine.edit.methods.hparams import FinetuneHparams, Hparams, MemitHparams, RomeHparams, ValueHparams
from causalcone.engine.edit.methods.least_squares import History
from causalcone.engine.edit.methods.method import EditableModel, Method, VectorMethod
from causalcone.engine.edit.methods.registry import method_named
from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.edit.requests.problems import FilteredFacts, make_requests
from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.scoring.evaluate import Evaluator, Scores
from causalcone.engine.edit.scoring.generation_metrics import References
from causalcone.engine.edit.scoring.tables import probe_batch
from causalcone.engine.edit.sequences.sequence import EditSequence
from causalcone.engine.edit.texts.contexts import Contexts, check_contexts, sample_contexts
from causalcone.engine.encoding import PromptForm, PromptOptions
from causalcone.engine.errors import ExperimentError
from causalcone.engine.facts import Fact, OnError, SkippedFacts
from causalcone.engine.localize.options import DEFAULT_SIGMA, Compat
from causalcone.engine.noise import parse_sigma
from causalcone.engine.run.loading import open_session
from causalcone.engine.run.session import Session
from causalcone.engine.schemas import PROBE_SCHEMA
from causalcone.kernels.precision import each_within

LayerChoice = str | Sequence[int | Sequence[int]]


class Editor:
    """Edits facts in a transformers model, whose weights stay as they are: edits are changes of weights (``Delta``).

    Args:
        model: A transformers model.
        tokenizer: Its tokenizer.
        moments: Second moments of the layers to be edited, which ROME and MEMIT need.
        contexts: Texts put before prompts, or one list for both methods; sampled from the model by default.
        dtype: As for ``Tracer``, like device, memory and tf32.
        sigma: Noise of Tracing Reversal and Fact Forcing: a number, or ``"<k>sd"`` of the subjects' embeddings ("3sd").
        seed: The seed of everything that is sampled.
        kernels: As for ``Tracer``, except that attention is always torch's, since most of it needs gradients.
        prompts: How prompts are put to the model, as for ``Tracer``; contexts and texts that models write are in no
            chat.
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
        kernels: Kernels | None = None,
        tf32: bool = False,
        **prompts: Unpack[PromptOptions],
    ) -> None:
        compute = Compute.of(dtype, device, memory, kernels, tf32)
        session = Session(model, tokenizer, compute, form=PromptForm(**prompts))
        self._open(session, moments, contexts, sigma, seed)

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
        """An editor for a model as ``Tracer.from_pretrained`` takes it; weights are kept in ``dtype``."""
        compute = Compute.of(dtype, device, memory, options.pop("kernels", None), options.pop("tf32", False))
        form = PromptForm(**{name: options.pop(name) for name in PromptOptions.__annotations__ if name in options})
        return cls.on(open_session(path, compute, form=form), moments, **options)

    def _open(
        self, session: Session, moments: Moments | None, contexts: Any, sigma: float | str | None, seed: int
    ) -> None:
        self.session, self.moments, self.seed = session, moments, seed
        self.sigma = DEFAULT_SIGMA if sigma is None else sigma
        parse_sigma(self.sigma)
        if contexts is not None:
            texts = contexts if isinstance(contexts, Contexts) else Contexts(*2 * (check_contexts(contexts),))
            self.__dict__["contexts"] = texts
        self.encoder = Encoder(session.prompts, session.sizes)
        self.evaluator = Evaluator(session, self.encoder, seed)

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
        compat: Compat | None = None,
    ) -> list[Request]:
        """Requests that a problem makes of facts (docs/editing.md, "Problems"; Hase et al. 2023).

        Args:
            facts: Facts with different ids.
            problem: error_injection, tracing_reversal, fact_erasure, fact_amplification or fact_forcing.
            filtered: Leave out facts that the model does not complete, and warn ``FilteredFacts``.
            on_error: ``"skip"`` leaves out facts that cannot be used, and warns ``SkippedFacts``.
            compat: ``"published"`` makes requests as published code does.

        Returns:
            The requests, in the order of the facts.

        Raises:
            FactError: for a fact that cannot be used; the message says why and how to fix it.
            ExperimentError: for another argument that cannot be used.
        """
        options: dict[str, Any] = {"filtered": filtered, "on_error": on_error, "compat": compat, "seed": self.seed}
        requests, skipped, unposed = make_requests(self.session, facts, problem, self.sigma, **options)
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
            The edits, request by request. Those that fail carry the reason; the others are made all the same.

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
        listed, (window,), checked = self._prepare(MEMIT_JOINT, requests, [tuple(layers)], None, hparams)
        if not listed:
            raise ExperimentError("there are no requests; give at least one")
        with self.session.computing():
            model = self._model(MEMIT_JOINT)
            joint = next(Memit(model, checked, together=True).joint(listed, [window]))
            return replace(joint, judged=model.judged)

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
            method: ``"rome"``, ``"r-rome"``, ``"p-rome"``, ``"memit"``, ``"memit_joint"``, ``"finetune"``, or another
                registered name; the edits are called so.
            layers: The layers, or the windows' centres, from 0, or ``"all"``; or lists of layers.
            window: Layers in a window; the method's default if None.
            hparams: Hyperparameters of the method; the defaults if None.

        Raises:
            ExperimentError: An argument, or the editor's moments, cannot be used; this is checked at once.
        """
        definition = method_named(method)
        listed, windows, checked = self._prepare(definition, requests, layers, window, hparams)
        if not listed:
            return iter(())
        model = self._model(definition)

        def named(batch: list[Edit]) -> list[Edit]:
            return [model.judged(replace(edit, method=definition.name)) for edit in batch]

        batches = definition.build(model, checked).batches(listed, windows)
        return map(named, each_within(self.session.computing, batches))

    def sequence(
        self,
        requests: Sequence[Request],
        method: str,
        layers: LayerChoice,
        window: int | None = None,
        hparams: Hparams | None = None,
        *,
        batch: int = 1,
        history: bool | None = None,
    ) -> EditSequence:
        """Edits in sequence, batch after batch, each on the model that the ones before left (docs/editing.md,
        "Sequences").

        Args:
            requests: Requests, as ``Editor.requests`` makes them, in the order in which they are edited.
            method: As for ``batches``; methods that can edit the requests of a batch in one change do.
            layers: One layer, or a window's centre, or its layers as one list; such as ``[5]`` or ``[(3, 4, 5)]``.
            window: Layers in a window; the method's default if None.
            hparams: Hyperparameters of the method; the defaults if None.
            batch: Requests that are edited together.
            history: Whether later edits preserve the keys of earlier ones; if None, as the method does by default.

        Returns:
            An iterator, which makes a batch for every ``next``; ``delta`` is the change so far, which
            ``causalcone.apply`` writes.

        Raises:
            ExperimentError: An argument, or the editor's moments, cannot be used; this is checked at once.
        """
        definition = method_named(method)
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ExperimentError(f"the batch is {batch!r}; give a whole number of edits, at least one")
        if history and definition.history is None:
            raise ExperimentError(
                f"{definition.name} cannot preserve the keys of earlier edits; leave history out, or choose a method "
                "that solves for keys, such as memit-seq"
            )
        listed, windows, checked = self._prepare(definition, requests, layers, window, hparams)
        if not listed or len(windows) != 1:
            raise ExperimentError(
                f"a sequence of {len(listed)} requests in {len(windows)} windows of layers; give at least one request, "
                "and one window, such as layers=[(3, 4, 5)]"
            )
        kept = bool(definition.history) if history is None else history
        sequence = EditSequence(
            model=self._model(definition),
            method=definition,
            hparams=checked,
            requests=listed,
            window=windows[0],
            size=batch,
            history=History() if kept else None,
            within=self.session.computing,
        )
        sequence.notes()  # refuses a problem that has no solution
        return sequence

    def norm_anchor(
        self, requests: Sequence[Request], method: str, layer: int, hparams: ValueHparams | None = None
    ) -> float:
        """The usual norm of the MLP's output once a search has found its vector (NAS, arXiv 2602.02543): what
        ``norm_anchor`` of the hyperparameters is to be.

        Args:
            requests: Requests to search for, such as 1,000 that are not edited later.
            method: A method that searches for vectors, such as ``"memit"``.
            layer: The layer, or the last one of a window.
            hparams: Hyperparameters of the method; the defaults if None.

        Returns:
            The mean norm over the requests without the largest twentieth, of searches with the bare prompts.

        Raises:
            ExperimentError: for a method that searches for no vectors, or where no search succeeds.
        """
        definition = method_named(method)
        listed, (window,), checked = self._prepare(definition, requests, [layer], 1, hparams)
        model = replace(self._model(definition), contexts=())
        maker = definition.build(model, checked)
        if not isinstance(maker, VectorMethod):
            raise ExperimentError(f"{method} searches for no vectors; choose one that does, such as memit")
        norms: list[float] = []
        with self.session.computing():
            for tasks in maker.groups(model.tasks(listed), [window]):
                norms += maker.reached_norms(tasks, layer)
        if not norms:
            raise ExperimentError("no search found a vector; give other requests, or other hyperparameters")
        return float(np.mean(sorted(norms)[: max(1, int(0.95 * len(norms)))]))

    def run(
        self,
        requests: Sequence[Request],
        method: str,
        layers: LayerChoice,
        window: int | None = None,
        hparams: Hparams | None = None,
    ) -> Iterator[tuple[Edit, pa.RecordBatch]]:
        """Make edits and score them, batch by batch; one batch is held at a time. Arguments as for ``batches``.

        Returns:
            Each edit with its probes, a batch with the columns of ``PROBE_SCHEMA``.
        """
        batches = self.batches(requests, method, layers, window, hparams)
        while batch := next(batches, None):
            for scored in self.evaluator.score(batch):
                yield scored.edit, probe_batch([scored])
                del scored
            del batch

    def score(self, edits: Sequence[Edit]) -> pa.Table:
        """Probabilities of both targets on all prompts of the edits' facts, before and after each edit.

        Args:
            edits: Edits of different ids. No weight is written.

        Returns:
            A row for every edit and prompt, with the columns of ``PROBE_SCHEMA``.

        Raises:
            ExperimentError: for an edit that does not fit the model, or is there twice.
        """
        return pa.Table.from_batches([self.evaluate(edits).probes], schema=PROBE_SCHEMA)

    def evaluate(
        self,
        edits: Sequence[Edit],
        *,
        essence: bool = False,
        accuracy: bool = False,
        generation: bool = False,
        references: References | None = None,
        answers: bool = False,
    ) -> Scores:
        """Probes and metrics of edits (docs/editing.md, "Scores").

        Args:
            edits: Edits of different ids. Facts without evaluation prompts have rewrite probes only.
            essence: Measure the perplexity of five texts about each subject, sampled from the unedited model.
            accuracy: Measure the share of the targets' tokens that are most likely.
            generation: Measure the entropy of texts that the edited models write.
            references: Texts about the targets; measure how similar those that are written are to them.
            answers: Let edited models answer freely, and measure the share of accepted answers.

        Returns:
            The edits, and tables of their probes and metrics, and of the texts that were written.

        Raises:
            ExperimentError: for an edit that does not fit the model, or is there twice.
        """
        return self.evaluator.evaluate(edits, essence, accuracy, generation, references, answers)

    def _prepare(
        self, method: Method, requests: Any, layers: Any, window: int | None, hparams: Hparams | None
    ) -> tuple[list[Request], list[Window], Any]:
        """Requests, windows and hyperparameters, checked before anything is computed."""
        if isinstance(requests, Request) or not isinstance(requests, Iterable):
            raise ExperimentError(f"requests are {requests!r}; give a list, as Editor.requests makes it")
        requests, windows = list(requests), method.windows(layers, window, self.session.sizes.depth)
        checked = method.checked(hparams)
        for request in requests:
            if not isinstance(request, Request):
                raise ExperimentError(f"{request!r} is not a request; make them with Editor.requests(facts, problem)")
            self.encoder.trained(request, 1)
        if method.needs_moments:
            if self.moments is None:
                raise ExperimentError(
                    f"{method.name} needs second moments: Editor(model, tokenizer, moments=Moments.collect(...))"
                )
            edited = sorted({layer for window in windows for layer in window.layers})
            self.moments.check(self.session.architecture, edited)
        if requests:
            self.session.verify(self.encoder.bare(requests[0]).text.tokens)
        return requests, windows, checked

    def _model(self, method: Method) -> EditableModel:
        layers, batching = layers_and_batching(self.session)
        contexts = () if method.contexts is None else getattr(self.contexts, method.contexts)
        return EditableModel(
            layers=layers, encoder=self.encoder, batching=batching, contexts=contexts, moments=self.moments
        )


def _flat(batches: Iterable[list[Edit]]) -> list[Edit]:
    return [edit for batch in batches for edit in batch]
