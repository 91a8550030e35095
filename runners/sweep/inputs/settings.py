"""What every sweep has in its TOML file. Tables of single stages are with the stages."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, StrictBool, StrictFloat, StrictInt, StrictStr

from causalcone.engine.encoding import Bos, PromptForm, PromptOptions
from causalcone.runners.checked_files import CheckedTable, Count, noise_level
from causalcone.runners.facts.schemas import ZsreForm

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Target = Literal["label", "argmax"]
Names = Annotated[tuple[StrictStr, ...], Field(min_length=1)]
Tokens = StrictStr | tuple[StrictInt, ...]
Share = Annotated[StrictFloat, Field(ge=0, le=1)]


def _on_record(name: str) -> str:
    from causalcone.analysis.papers.records import Record
    from causalcone.analysis.tables.traces import TableError

    try:
        folder = Record.open(name).folder
    except TableError as error:
        raise ValueError(str(error)) from error
    return str(folder.resolve()) if folder == Path(name) else name  # tables are read from anywhere


class FilterSettings(CheckedTable):
    """Which facts are traced and edited. completes: those whose answer is in the 36 tokens that the
    model writes greedily after the prompt; argmax: those whose answer is what it writes first, greedily; erasable: in
    Fact Erasure those whose answer is at least so likely."""

    completes: StrictBool = True
    argmax: StrictBool = False
    erasable: Share = 0.02


class NoiseSettings(CheckedTable):
    """Of corrupted runs. sigma: a number, or "3sd" for three standard deviations of the subjects' embeddings."""

    sigma: Annotated[float | str, PlainValidator(noise_level)] = "3sd"
    samples: Count = 10
    seed: StrictInt = 1


class MomentSettings(CheckedTable):
    """Second moments for ROME and MEMIT: a file, or texts to collect them over, by default those the model writes."""

    file: StrictStr | None = None
    texts: StrictStr | None = None
    dataset: StrictStr | None = None
    dataset_config: StrictStr | None = None
    split: StrictStr = "train"
    column: StrictStr = "text"
    tokens: Count | Literal["all"] | None = None
    ridge: Annotated[float, Field(ge=0)] = 0.0

    @property
    def sources(self) -> list[str]:
        """The keys of those that are given; there should be one."""
        return [key for key in ("file", "texts", "dataset") if getattr(self, key) is not None]


class UnitSettings(CheckedTable):
    """How many facts, or how many edits, are computed and written at a time."""

    facts: Count = 32
    edits: Count = 256


class Sweep(CheckedTable):
    """A whole study; ``stages.as_sweep`` adds a table for each stage. seed: of everything that is drawn but noise;
    contexts: a file of texts put before prompts, drawn from the model by default; shape: the model's configuration,
    where a plan is wanted of a model that is not at hand; zsre_form: how zsRE's records are read; columns: of flat
    records, the columns of fields; published: the study on record whose tables are set beside; answer_score: what the
    analysis takes p of several tokens for; compat: "published" does as published code does, where that differs; chat,
    system, bos and keep_space: as ``PromptForm``'s."""

    younger = frozenset(PromptOptions.__annotations__) | {"columns", "sequence"}
    model: StrictStr
    facts: StrictStr
    limit: Count | None = None
    skip_bad_facts: StrictBool = False
    zsre_form: ZsreForm = "hase"
    columns: dict[StrictStr, StrictStr] | None = None
    published: Annotated[StrictStr, AfterValidator(_on_record)] | None = None
    answer_score: Literal["product", "mean"] = "product"
    dtype: Dtype | None = None
    device: StrictStr | None = None
    memory: StrictStr | StrictInt | None = None
    kernels: Literal["torch", "triton", "flash"] | None = None
    tf32: StrictBool = False
    seed: StrictInt = 0
    compat: Literal["published"] | None = None
    shape: dict[str, Any] | None = None
    chat: StrictBool = False
    system: StrictStr | None = None
    bos: Bos = "auto"
    keep_space: StrictBool = False
    filter: FilterSettings = FilterSettings()
    noise: NoiseSettings = NoiseSettings()
    moments: MomentSettings = MomentSettings()
    contexts: StrictStr | None = None
    units: UnitSettings = UnitSettings()

    @property
    def result_config(self) -> dict[str, Any]:
        """All that decides the results, as JSON; not where and in how much memory they are computed."""
        shown = {"published", "answer_score"}
        return self.model_dump(mode="json", exclude={"device", "memory", "kernels", "shape", *shown})

    @property
    def form(self) -> PromptForm:
        return PromptForm(**{name: getattr(self, name) for name in PromptOptions.__annotations__})

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.result_config, sort_keys=True).encode()).hexdigest()[:16]
