"""What a sweep does: a TOML file or the name of a preset, checked key by key."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from causalcone.engine.errors import CausalconeError, ExperimentError
from causalcone.engine.localize.options import as_tokens, check_tokens
from causalcone.engine.localize.states import as_states
from causalcone.engine.memory import parse_bytes
from causalcone.engine.schemas import Problem
from causalcone.runners.checked_files import CheckedTable, Count, complaints, noise_level, read_toml
from causalcone.runners.demo.files import path_of
from causalcone.runners.edits.settings import EditPlan

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Target = Literal["label", "argmax"]
Names = Annotated[tuple[StrictStr, ...], Field(min_length=1)]
Tokens = StrictStr | tuple[StrictInt, ...]
Share = Annotated[StrictFloat, Field(ge=0, le=1)]


class FilterSettings(CheckedTable):
    """Which facts are traced and edited. completes: those whose answer is among the model's 36 likeliest tokens, one
    after the other; argmax: those whose answer is the likeliest next token; erasable: in Fact Erasure those whose
    answer is at least so likely."""

    completes: StrictBool = True
    argmax: StrictBool = False
    erasable: Share = 0.02


class NoiseSettings(CheckedTable):
    """Of corrupted runs. sigma: a number, or "3sd" for three standard deviations of the subjects' embeddings."""

    sigma: Annotated[float | str, PlainValidator(noise_level)] = "3sd"
    samples: Count = 10
    seed: StrictInt = 1


class TraceSettings(CheckedTable):
    """Causal tracing: what is restored, at which tokens, of how many facts (all by default)."""

    states: Names = ("hidden:1", "mlp:10", "attn:10")
    tokens: Tokens = "all"
    target: Target = "label"
    facts: Count | None = None


class SeverSettings(CheckedTable):
    """Severed tracing of hidden states, once for each of the parts that are held."""

    parts: Annotated[tuple[Literal["mlp", "attn", "both"], ...], Field(min_length=1)] = ("mlp", "attn")
    tokens: Tokens = "subject_last"
    target: Target = "label"
    facts: Count | None = None


class ZeroSettings(CheckedTable):
    """Representation zeroing."""

    states: Names = ("mlp:5",)
    tokens: Tokens = "subject"
    target: Target = "label"
    facts: Count | None = None


class GradientSettings(CheckedTable):
    """Integrated gradients."""

    kinds: Annotated[tuple[Literal["hidden", "mlp", "attn"], ...], Field(min_length=1)] = ("hidden", "mlp", "attn")
    steps: Count = 50
    tokens: Tokens = "all"
    target: Target = "argmax"
    facts: Count | None = None


class EditSettings(CheckedTable):
    """Which edits are made of how many facts, and how they are scored.

    methods: as of ``causalcone edit``, such as "memit:5"; layers: "preset", "all", or numbers from 0; preset: where
    hyperparameters are from; set: what differs from these, such as "rome.steps=5"; essence, accuracy, generation,
    references: as of ``causalcone edit``, generation also of some problems only, whose names are given; aggregate:
    which paraphrases and neighbours the scores shown are of.
    """

    problems: Annotated[tuple[Problem, ...], Field(min_length=1)] = ("error_injection",)
    methods: Names = ("rome", "memit:5", "finetune:1", "finetune:5")
    layers: Literal["preset", "all"] | tuple[StrictInt, ...] = "all"
    preset: StrictStr | None = None
    set: tuple[StrictStr, ...] = ()
    facts: Count | None = None
    essence: StrictBool = True
    accuracy: StrictBool = False
    generation: StrictBool | tuple[Problem, ...] = False
    references: StrictStr | None = None
    aggregate: Literal["first", "mean"] | None = None

    def generates(self, problem: str) -> bool:
        """Whether the models that a problem's edits make are to write, for what is measured of their texts."""
        if isinstance(self.generation, tuple):
            return problem in self.generation
        return self.generation or self.references is not None

    def references_path(self) -> str:
        """The file of reference texts."""
        return path_of(str(self.references), "snippets")


class MomentSettings(CheckedTable):
    """Second moments for ROME and MEMIT: a file, or the texts that they are collected over."""

    file: StrictStr | None = None
    texts: StrictStr | None = None
    dataset: StrictStr | None = None
    dataset_config: StrictStr | None = None
    split: StrictStr = "train"
    column: StrictStr = "text"
    tokens: Count | Literal["all"] | None = None
    ridge: Annotated[float, Field(ge=0)] = 0.0

    def file_path(self) -> str:
        """The file of moments."""
        return path_of(str(self.file), "moments")


class UnitSettings(CheckedTable):
    """How much is computed, and written, at a time: so many facts, or so many edits."""

    facts: Count = 32
    edits: Count = 256


class Sweep(CheckedTable):
    """A whole study. seed: of everything that is drawn but noise; contexts: a file of texts put before prompts, drawn
    from the model by default; shape: the model's configuration, where a plan is wanted of one that is not at hand;
    zsre_form: how zsRE's records are read; published: the study whose published tables are set beside; compat:
    "published" does as published code does, where that differs."""

    model: StrictStr
    facts: StrictStr
    limit: Count | None = None
    skip_bad_facts: StrictBool = False
    zsre_form: Literal["hase", "meng"] = "hase"
    published: Literal["hase2023-gptj", "hase2023-zsre"] | None = None
    dtype: Dtype | None = None
    device: StrictStr | None = None
    memory: StrictStr | StrictInt | None = None
    kernels: Literal["torch", "triton", "flash"] | None = None
    tf32: StrictBool = False
    seed: StrictInt = 0
    compat: Literal["published"] | None = None
    shape: dict[str, Any] | None = None
    filter: FilterSettings = FilterSettings()
    noise: NoiseSettings = NoiseSettings()
    trace: TraceSettings | None = None
    sever: SeverSettings | None = None
    zero: ZeroSettings | None = None
    gradients: GradientSettings | None = None
    edit: EditSettings | None = None
    moments: MomentSettings = MomentSettings()
    contexts: StrictStr | None = None
    units: UnitSettings = UnitSettings()

    def facts_path(self) -> str:
        """The file of facts."""
        return path_of(self.facts, "facts")

    def outline_path(self) -> str:
        """A folder, or a hub id, with the model's configuration and tokenizer."""
        return path_of(self.model, "outline")

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides the results, as JSON has it: all but where and in how much memory they are computed."""
        return self.model_dump(mode="json", exclude={"device", "memory", "kernels", "shape", "published"})

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.decisive, sort_keys=True).encode()).hexdigest()[:16]

    def plan(self, problem: str) -> EditPlan:
        """What is done to the facts that a problem is posed for."""
        assert self.edit is not None
        edit = self.edit
        return EditPlan.of(
            edit.methods, problem, layers=edit.layers, preset=edit.preset, changes=edit.set,
            sigma=self.noise.sigma, aggregate=edit.aggregate,
        )  # fmt: skip


def sweep_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(file.name.removesuffix(".toml") for file in _presets().iterdir() if file.name.endswith(".toml"))


def load_sweep(preset: str, changes: Sequence[str] = ()) -> Sweep:
    """The sweep of a preset's name, or of a TOML file, with changes such as "edit.layers=[0, 4]".

    Raises ``ExperimentError`` naming the key that is wrong and what it may be.
    """
    if preset.endswith(".toml"):
        named, table = preset, read_toml(Path(preset))
    elif preset in sweep_names():
        named = f"preset {preset!r}"
        table = tomllib.loads(_presets().joinpath(f"{preset}.toml").read_text(encoding="utf-8"))
    else:
        raise ExperimentError(
            f"there is no sweep {preset!r}; choose from {', '.join(sweep_names())}, or give the path of a .toml file"
        )
    for change in changes:
        _apply(table, change)
    try:
        sweep = Sweep.model_validate(table)
    except ValidationError as error:
        raise ExperimentError(f"{named}: {'; '.join(dict.fromkeys(complaints(error)))}") from error
    _check(named, sweep)
    return sweep


def _presets() -> Any:
    return files("causalcone.runners").joinpath("presets/sweeps")


def _apply(table: dict[str, Any], change: str) -> None:
    """Set a key, in tables of tables, to a value in TOML's form; what is none is a text."""
    key, equals, value = change.partition("=")
    *folders, last = [part.strip() for part in key.split(".")]
    if not equals or not all([*folders, last]):
        raise ExperimentError(f"--set {change!r} is no setting; give KEY=VALUE, such as edit.layers=[0,4]")
    for folder in folders:
        table = table.setdefault(folder, {})
        if not isinstance(table, dict):
            raise ExperimentError(f"--set {change}: {folder} is no table, and has no {last}")
    text = value.strip()
    if text == "none":
        table.pop(last, None)
        return
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text


def _check(named: str, sweep: Sweep) -> None:
    """Refuse what can be seen to be wrong without model and facts."""

    def check(key: str, make: Callable[[], object]) -> None:
        try:
            make()
        except CausalconeError as error:
            raise ExperimentError(f"{named}: {key}: {error}") from error

    if sweep.memory is not None:
        check("memory", lambda: parse_bytes(sweep.memory))  # type: ignore[arg-type]
    for key in ("trace", "zero"):
        own = getattr(sweep, key)
        if own is not None:
            check(f"{key}.states", lambda own=own: as_states(own.states))  # type: ignore[misc]
    for key in ("trace", "sever", "zero", "gradients"):
        own = getattr(sweep, key)
        if own is not None:
            check(f"{key}.tokens", lambda own=own: check_tokens(as_tokens(own.tokens)))  # type: ignore[misc]
    given = [name for name in ("file", "texts", "dataset") if getattr(sweep.moments, name) is not None]
    if len(given) > 1:
        raise ExperimentError(f"{named}: moments: {' and '.join(given)} are both given; give one of the two")
    if sweep.edit is None:
        if all(getattr(sweep, key) is None for key in ("trace", "sever", "zero", "gradients")):
            raise ExperimentError(f"{named}: there is nothing to do; give one of trace, sever, zero, gradients, edit")
        return
    if sweep.edit.layers == "preset" and sweep.edit.preset is None:
        raise ExperimentError(f"{named}: edit.layers is 'preset', and no edit.preset is given; give one, or the layers")
    for problem in sweep.edit.problems:
        check("edit", lambda problem=problem: sweep.plan(problem))  # type: ignore[misc]
    if sweep.plan(sweep.edit.problems[0]).of_moments and not given:
        raise ExperimentError(
            f"{named}: edit.methods need second moments; give moments.file, moments.texts or moments.dataset"
        )
