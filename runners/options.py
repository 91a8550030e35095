"""The options of the commands, in groups that several commands share."""

# ruff: noqa: RUF009 - ``option`` makes a field

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from typer import Argument, Option


def option(default: Any, help: str, *names: str, made: Any = Option, **more: Any) -> Any:
    """A field that ``takes`` makes an option of a command; needed where ``default`` is ``...``."""
    parameter = made(default, *names, help=help, **more)
    return field(default=MISSING if default is ... else default, metadata={"option": parameter})


def _checked_answer_score(value: str | None) -> str | None:
    """Refused before anything is computed."""
    from causalcone.analysis.tables.traces import ANSWER_SCORES, one_of

    if value is not None:
        one_of("--answer-score", value, ANSWER_SCORES)
    return value


_ANSWER_HELP = "p of an answer of several tokens: product over them, or mean, their geometric mean."
_answer_score: dict[str, Any] = {"callback": _checked_answer_score}


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How what is computed is shown."""

    answer_score: str = option("product", _ANSWER_HELP, **_answer_score)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    model: str = option(
        ..., "Model folder, hub id or GGUF file; 'demo' is the embedded demo model, 'smollm2' a small real one."
    )


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(ModelOptions):
    dtype: str | None = option(None, "Compute in float64, float32, bfloat16 or float16; the model's own by default.")
    device: str | None = option(None, "Compute on cpu, cuda, cuda:1, ...; cuda by default where it is.")
    memory: str | None = option(None, "Bytes that a pass may take, such as 4GiB; half of what is free by default.")


COLUMN_HELP = (
    "Of flat records: the column that a field is in, FIELD=COLUMN, such as subject=name; repeat for several fields."
)


@dataclass(frozen=True, kw_only=True)
class PromptFormOptions:
    """How prompts are put to the model."""

    chat: bool = option(False, "Prompts are the user's message in the model's chat template.", "--chat")
    system: str | None = option(None, "The system's message before it.")
    bos: str = option("auto", "A BOS token before prompts: always, never, or auto, as the tokenizer does it.")
    keep_space: bool = option(False, "Leave spaces at a prompt's end; they are cut by default.", "--keep-space")


@dataclass(frozen=True, kw_only=True)
class SinglePromptOptions:
    """One prompt in place of a file of facts."""

    prompt: str | None = option(
        None, "One prompt instead of --facts, with its subject in it; files are written with --out alone."
    )
    subject: str | None = option(None, "The words of the prompt that it is about.")
    answer: str | None = option(None, "The prompt's answer; the model's likeliest token by default.")

    def target(self, of_facts: str) -> str:
        """The target whose probability is read: the prompt's, or where there is none, that of a file's facts."""
        return of_facts if self.prompt is None else "argmax" if self.answer is None else "label"

    @property
    def asked(self) -> dict[str, str | None]:
        """The prompt, and what goes with it."""
        return {name: getattr(self, name) for name in ("prompt", "subject", "answer", "new") if hasattr(self, name)}


@dataclass(frozen=True, kw_only=True)
class EditedPromptOptions(SinglePromptOptions):
    new: str | None = option(None, "What the prompt is to be answered with, of --prompt.")


_FACTS_HELP = (
    "File of facts, of any format that 'causalcone data' reads; 'smollm2': real facts; 'demo': the demo world; -: what "
    "comes in on standard input."
)


@dataclass(frozen=True, kw_only=True)
class FactsOptions(PromptFormOptions, ModelOptions):
    facts: str | None = option(None, _FACTS_HELP, show_default=False)
    column: list[str] | None = option(None, COLUMN_HELP, show_default=False)
    limit: int | None = option(None, "Only the first N facts.", min=1)
    skip_bad_facts: bool = option(False, "List unusable facts and go on.", "--skip-bad-facts")


@dataclass(frozen=True, kw_only=True)
class SourceOptions(ComputeOptions, FactsOptions):
    kernels: str | None = option(
        None, "Force torch, triton or flash (attention); by default triton on CUDA devices, else torch."
    )
    tf32: bool = option(False, "Multiply float32 in TF32 on CUDA devices: faster, 10 bits of mantissa.", "--tf32")


@dataclass(frozen=True, kw_only=True)
class StreamableSourceOptions(SourceOptions):
    """The model, whose weights may stay in their files, and the facts."""

    weights: str = option(
        "resident",
        "resident: keep the weights on the device; stream: read them from the model's files in every pass, "
        "for models larger than the device.",
    )


@dataclass(frozen=True, kw_only=True)
class TracedOptions(SinglePromptOptions, StreamableSourceOptions):
    """The model, and the facts or one prompt."""


@dataclass(frozen=True, kw_only=True)
class IntegratedOptions(SinglePromptOptions, SourceOptions):
    """The same, with the weights in memory."""


@dataclass(frozen=True, kw_only=True)
class EditedOptions(EditedPromptOptions, SourceOptions):
    """The same, with what one prompt is to be answered with."""


@dataclass(frozen=True, kw_only=True)
class TuningSourceOptions(SourceOptions):
    """The model, and the few facts that settings are tuned on."""

    facts: str = option(..., _FACTS_HELP)
    limit: int | None = option(100, "Only the first N facts of the file.", min=1)


@dataclass(frozen=True, kw_only=True)
class PromptOutputOptions:
    """Where results go; those of one prompt may be shown only."""

    out: Path | None = option(None, "Folder for the results; not needed with --prompt.", show_default=False)
    overwrite: bool = option(False, "Replace the run that the folder holds.", "--overwrite")
    quiet: bool = option(False, "No progress and no summary.", "--quiet")


@dataclass(frozen=True, kw_only=True)
class OutputOptions(PromptOutputOptions):
    out: Path = option(..., "Folder for the results.")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The noise of the corrupted run: how much, and which."""

    samples: int = option(10, "Noise samples to average over.")
    sigma: str = option("3sd", "Noise level: a number, or '3sd' for 3 standard deviations of the subjects' embeddings.")
    seed: int = option(1, "Seed of the noise.")


_TARGET_HELP = "'label': the fact's own target; 'argmax': the model's most likely token."
_TOKENS_HELP = "all, subject_onward, subject, subject_last, last, or indices such as 0,3,-1."


@dataclass(frozen=True, kw_only=True)
class TracingOptions:
    state: list[str] | None = option(
        None,
        "States to restore, KIND:WINDOW with kind hidden, mlp, attn, head.N (one head) or heads (every one); "
        "repeat for several. By default hidden:1, mlp:10 and attn:10; with --sever hidden:1.",
        show_default=False,
    )
    target: str = option("label", _TARGET_HELP)
    tokens: str = option("all", _TOKENS_HELP)
    joint: bool = option(False, "Restore the chosen tokens together, not one by one.", "--joint")
    sever: str | None = option(
        None, "Hold the token's mlp or attn outputs, or both, at their corrupted values; hidden states only."
    )
    noise: str = option(
        "gaussian", "Noise that corrupts the subject: gaussian, uniform, multivariate, t, or counterfactual (a prompt)."
    )
    replace_noise: bool = option(
        False, "Put the noise in the embeddings' place; it is added by default.", "--replace-noise"
    )
    noise_texts: Path | None = option(
        None, "Running text, one text a line: multivariate and t noise are like its embeddings."
    )
    dof: float | None = option(None, "Degrees of freedom of t noise, more than 2.")
    extra_tokens: int = option(0, "Corrupt the N tokens after the subject too.")
    compat: str | None = option(
        None, "'published': severed runs and replacing noise draw and report as the published code does."
    )


@dataclass(frozen=True, kw_only=True)
class ZeroingOptions:
    state: list[str] | None = option(
        None,
        "States to set to zero, KIND:WINDOW as for trace; repeat for several. By default mlp:5.",
        show_default=False,
    )
    target: str = option("label", _TARGET_HELP)
    tokens: str = option("subject", _TOKENS_HELP + " All chosen ones are zeroed together.")


@dataclass(frozen=True, kw_only=True)
class IntegrationOptions:
    kind: list[str] | None = option(
        None, "hidden, mlp or attn; repeat for several. By default all three.", show_default=False
    )
    steps: int = option(50, "Points of the quadrature.")
    baseline: str = option("zero", "Where the path starts: zero, or corrupted (the state in the corrupted run).")
    target: str = option("argmax", _TARGET_HELP)
    tokens: str = option("all", _TOKENS_HELP)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    texts: str | None = option(
        None,
        "Running text: a .txt file (a text a line), JSON lines or Parquet (with a column of texts), or a "
        "folder of such files; 'demo' are the demo model's training sentences. By default the model writes it itself.",
    )
    dataset: str | None = option(
        None, "Take a data set instead: a hub id, or a folder of one. Needs the package datasets."
    )
    dataset_config: str | None = option(None, "The data set's configuration, such as wikitext-103-v1.")
    split: str = option("train", "The data set's split.")
    column: str = option("text", "The column that holds the texts.")


@dataclass(frozen=True, kw_only=True)
class MomentsFileOptions:
    out: Path = option(Path("moments.safetensors"), "File for the moments.")
    resume: Path | None = option(
        None, "File that keeps a collection under way; OUT.partial by default.", show_default=False
    )
    overwrite: bool = option(False, "Replace the file.", "--overwrite")
    quiet: bool = option(False, "No progress and no summary.", "--quiet")


_LAYERS_HELP = "Layers, counted from 0: all, or numbers such as 0,4,8"


@dataclass(frozen=True, kw_only=True)
class CollectingOptions:
    layers: str = option("all", f"{_LAYERS_HELP}.")
    tokens: str | None = option(
        None, "Tokens to take, or all; by default 10 times the width of the MLP's hidden layer."
    )
    length: int | None = option(
        None, "Tokens that see each other, at most; 512 by default, or as many positions as the model has."
    )


_METHOD_HELP = (
    "METHOD or METHOD:WINDOW: rome (r-rome, p-rome: with its keys 'mean' or 'prompt'), memit, memit_joint (all facts "
    "in one change of the weights) or finetune, and how many layers it edits together; repeat for several."
)


_PRESET_HELP = (
    "Settings: gptj, gpt2-xl, llama-2-7b, llama-3-8b, llama-3.1-8b, llama-3.2-3b, qwen2.5-7b, mistral-7b, meng, "
    "smollm2, demo, or FILE.toml[:NAME]"
)


@dataclass(frozen=True, kw_only=True)
class EditMethodOptions:
    """How edits are made, whatever is asked of them and wherever they are made."""

    method: list[str] | None = option(None, _METHOD_HELP, show_default=False)
    window: int | None = option(
        None, "Layers edited together, for a METHOD without a WINDOW; by default 5 for MEMIT, 1 for fine-tuning.", min=1
    )
    preset: str | None = option(None, f"{_PRESET_HELP}.")
    changes: list[str] | None = option(
        None, "A hyperparameter of all methods that have it, NAME=VALUE, or of one, METHOD.NAME=VALUE; repeat.", "--set"
    )
    moments: str | None = option(
        None,
        "Second moments for ROME and MEMIT, of 'causalcone moments' or published with ROME; 'demo' are the "
        "demo model's. By default they are collected now, over text that the model writes.",
    )
    texts: str | None = option(None, "Collect the moments now, from running text as 'causalcone moments' takes it.")
    ridge: float = option(0.0, "Share of the moments' mean diagonal added to their diagonals, where they are singular.")
    contexts: Path | None = option(
        None, "Texts put before prompts: JSON with the lists rome and memit, or another run's run.json."
    )
    sigma: str | None = option(
        None, "Noise of Tracing Reversal and Fact Forcing, as for trace. By default the preset's, or 3sd."
    )
    seed: int = option(0, "Seed of all texts that are drawn.")
    filtered: bool = option(True, "Leave out facts that the model does not complete.", "--filter/--no-filter")
    compat: str | None = option(None, "'published': pose problems as the published code does.")


_PROBLEM_HELP = "error_injection, tracing_reversal, fact_erasure, fact_amplification or fact_forcing"
_AGGREGATE_HELP = "first, or mean. By default the preset's, or first."


@dataclass(frozen=True, kw_only=True)
class EditingOptions(EditMethodOptions):
    method: list[str] | None = option(
        None,
        f"{_METHOD_HELP} Of a --prompt by default rome.",
        show_default=False,
    )
    preset: str | None = option(
        None, f"{_PRESET_HELP}; auto: that of the model's name, without one guessed layers and default hyperparameters."
    )
    problem: str | None = option(
        None,
        f"{_PROBLEM_HELP}. By default error_injection; fact_amplification where the facts' new answer is the true one.",
        show_default=False,
    )
    layers: str | None = option(
        None,
        f"{_LAYERS_HELP}: the edited ones, or windows' centres. By default the preset's, without one all; of a "
        "--prompt the one a quarter of the way up, where the preset has not a single one.",
        "--layers",
        "--layer",
        show_default=False,
    )


@dataclass(frozen=True, kw_only=True)
class SequenceOptions:
    """Edits one after another, each on the model that the ones before left."""

    sequential: bool = option(
        False,
        "Edit in sequence, each batch on the model that the ones before left, in the window around one --layer; the "
        "same command goes on with a sequence that ended early.",
        "--sequential",
    )
    batch: int = option(100, "Facts that are edited together, of --sequential.", min=1)
    checkpoint: int = option(500, "Edits after which, and at the end, --sequential measures the model.", min=1)
    sample: int = option(100, "Of all edits before the last batch, how many are scored at a checkpoint.", min=0)
    held_out: str | None = option(
        None, "Running text whose perplexity is measured at checkpoints; by default text that the model writes first."
    )
    history: bool | None = option(
        None, "Preserve the keys of earlier edits; by default as the method does.", "--history/--no-history"
    )


@dataclass(frozen=True, kw_only=True)
class TuningOptions(EditMethodOptions):
    """Settings of editing that are tried, and how one is chosen."""

    method: list[str] = option(..., _METHOD_HELP)
    problem: list[str] | None = option(
        None, f"{_PROBLEM_HELP}; repeat for several. By default error_injection.", show_default=False
    )
    layer: int = option(..., "The edited layer, counted from 0, or the windows' centre.", min=0)
    grid: list[str] | None = option(
        None,
        "Values to try of a hyperparameter, METHOD.NAME=V1,V2,... or NAME=V1,V2,... of all methods that have "
        "it; repeat, and a method's names are combined. By default kl_factor=0.0625,0.9,1 of ROME and MEMIT, and "
        "norm_constraint=1e-4,5e-5,2e-5,1e-5 of fine-tuning.",
        show_default=False,
    )
    most: float = option(0.99, "The highest mean rewrite score that a setting may have.", min=0, max=1)
    give_up: float = option(
        0.05,
        "How far a setting's mean paraphrase and neighbourhood scores may each be below the best of those "
        "that settings within --most have.",
        min=0,
        max=1,
    )
    aggregate: str | None = option(None, f"Which paraphrases and neighbours are scored: {_AGGREGATE_HELP}")


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(AnswerOptions):
    essence: bool = option(False, "Perplexity of five texts about each subject.", "--essence")
    accuracy: bool = option(False, "Share of the target's tokens that are the likeliest.", "--accuracy")
    generation: bool = option(False, "Let edited models write, and measure the entropy of that (slow).", "--generation")
    answers: bool = option(
        False, "Let edited models answer freely, and measure the share of accepted answers (exact match).", "--answers"
    )
    references: Path | None = option(None, "Attribute snippets (JSON) to compare the texts of edited models with.")
    aggregate: str | None = option(None, f"Paraphrases and neighbours in the summary: {_AGGREGATE_HELP}")
    keep_deltas: bool = option(
        False, "Keep every edit's change of weights; fine-tuning's are as large as these.", "--keep-deltas"
    )


_FORMAT_HELP = "model: a folder like that of --model; peft: an adapter (LoRA) for it, of changes of low rank."


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ComputeOptions):
    """What is written of which edits, and how."""

    edits: Path = option(..., "Result folder of 'causalcone edit --keep-deltas', or one delta file.")
    edit: str | None = option(None, "Id of the edit, as in the table of edits; all: the sum of all edits' changes.")
    format: str = option("model", _FORMAT_HELP)
    max_rank: int | None = option(
        None, "Largest rank of an adapter, such as 64; the nearest change of that rank is written.", min=1
    )
    dtype: str | None = option(None, "Write in float64, float32, bfloat16 or float16; the model's own by default.")
    out: Path = option(..., "New folder for the model or adapter.")


@dataclass(frozen=True, kw_only=True)
class SavingOptions:
    """The edited model, written where there is one."""

    save: Path | None = option(None, "Write the edited model to this new folder, where one change of weights is made.")
    format: str = option("model", f"Of --save. {_FORMAT_HELP}")


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """The folder of a sweep, and how its tables are analysed."""

    folder: Path = option(..., "The folder of a sweep, finished or not.", made=Argument, metavar="DIR")
    state: str | None = option(
        None, "Whose tracing effects, such as mlp:5; the first MLP state of the sweep by default."
    )
    at: str = option("max", "Effects: max over the prompt's tokens, or at subject_last.")
    denominator: str = option("p_high", "Of restored fractions: p_high (published) or p_clean.")
    aggregate: str | None = option(
        None, "Paraphrases and neighbours: first (published) or mean; as the sweep says by default."
    )
    answer_score: str | None = option(None, f"{_ANSWER_HELP} As the sweep says by default.", **_answer_score)
    additive: bool = option(False, "Layer and effect without their interaction (published: with it).", "--additive")
    compat: str | None = option(
        None, "published: mean effects by layer are of positive effects only; as the sweep says by default."
    )
    beside: str | None = option(
        None,
        "A study on record to set beside: a paper's, such as hase2023-gptj, or a folder of tables that analyze wrote; "
        "as the sweep says by default.",
        metavar="NAME|DIR",
    )
    draws: int = option(1000, "Draws of the bootstrap and the permutation test.", min=100)
