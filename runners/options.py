"""The options of the commands, in groups that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from causalcone.runners.demo.files import path_of


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model."""

    model: Annotated[str, Option(help="Model folder or hub id; 'demo' is the embedded demo model.")]

    def model_path(self) -> str:
        """The model's folder or hub id."""
        return path_of(self.model, "model")


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(ModelOptions):
    """The model, and how to compute."""

    dtype: Annotated[
        str | None, Option(help="Compute in float64, float32, bfloat16 or float16; the model's own by default.")
    ] = None
    device: Annotated[str | None, Option(help="Compute on cpu, cuda, cuda:1, ...; cuda by default where it is.")] = None
    memory: Annotated[
        str | None, Option(help="Bytes that a pass may take, such as 4GiB; half of what is free by default.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class FactsOptions(ModelOptions):
    """The model and the facts."""

    facts: Annotated[
        str,
        Option(
            help="File of facts: CounterFact, zsRE, known-facts JSON, or causalcone's JSONL; 'demo': the demo world."
        ),
    ]
    limit: Annotated[int | None, Option(help="Only the first N facts.", min=1)] = None
    skip_bad_facts: Annotated[bool, Option("--skip-bad-facts", help="List unusable facts and go on.")] = False

    def facts_path(self) -> str:
        """The file of facts."""
        return path_of(self.facts, "facts")


@dataclass(frozen=True, kw_only=True)
class SourceOptions(ComputeOptions, FactsOptions):
    """The model and the facts, and how passes compute."""

    kernels: Annotated[
        str | None,
        Option(help="Force torch, triton or flash (attention); by default triton on CUDA devices, else torch."),
    ] = None
    tf32: Annotated[
        bool, Option("--tf32", help="Multiply float32 in TF32 on CUDA devices: faster, 10 bits of mantissa.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class StreamableSourceOptions(SourceOptions):
    """The model, whose weights may stay in their files, and the facts."""

    weights: Annotated[
        str,
        Option(
            help="resident: keep the weights on the device; stream: read them from the model's files in every pass, "
            "for models larger than the device."
        ),
    ] = "resident"


@dataclass(frozen=True, kw_only=True)
class TuningSourceOptions(SourceOptions):
    """The model, and the few facts that settings are tuned on."""

    limit: Annotated[int | None, Option(help="Only the first N facts of the file.", min=1)] = 100


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where results go."""

    out: Annotated[Path, Option(help="Folder for the results.")]
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run that the folder holds.")] = False
    quiet: Annotated[bool, Option("--quiet", help="No progress and no summary.")] = False


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The noise of the corrupted run: how much, and which."""

    samples: Annotated[int, Option(help="Noise samples to average over.")] = 10
    sigma: Annotated[
        str, Option(help="Noise level: a number, or '3sd' for 3 standard deviations of the subjects' embeddings.")
    ] = "3sd"
    seed: Annotated[int, Option(help="Seed of the noise.")] = 1


_TARGET_HELP = "'label': the fact's own target; 'argmax': the model's most likely token."
_TOKENS_HELP = "all, subject_onward, subject, subject_last, last, or indices such as 0,3,-1."


@dataclass(frozen=True, kw_only=True)
class TracingOptions:
    """The states that are restored, and the corrupted run that they are restored in."""

    state: Annotated[
        list[str] | None,
        Option(
            help="States to restore, KIND:WINDOW with kind hidden, mlp, attn, head.N (one head) or heads (every one); "
            "repeat for several. By default hidden:1, mlp:10 and attn:10; with --sever hidden:1.",
            show_default=False,
        ),
    ] = None
    target: Annotated[str, Option(help=_TARGET_HELP)] = "label"
    tokens: Annotated[str, Option(help=_TOKENS_HELP)] = "all"
    joint: Annotated[bool, Option("--joint", help="Restore the chosen tokens together, not one by one.")] = False
    sever: Annotated[
        str | None,
        Option(help="Hold the token's mlp or attn outputs, or both, at their corrupted values; hidden states only."),
    ] = None
    noise: Annotated[
        str,
        Option(
            help="Noise that corrupts the subject: gaussian, uniform, multivariate, t, or counterfactual (a prompt)."
        ),
    ] = "gaussian"
    replace_noise: Annotated[
        bool, Option("--replace-noise", help="Put the noise in the embeddings' place; it is added by default.")
    ] = False
    noise_texts: Annotated[
        Path | None, Option(help="Running text, one text a line: multivariate and t noise are like its embeddings.")
    ] = None
    dof: Annotated[float | None, Option(help="Degrees of freedom of t noise, more than 2.")] = None
    extra_tokens: Annotated[int, Option(help="Corrupt the N tokens after the subject too.")] = 0
    compat: Annotated[
        str | None,
        Option(help="'published': severed runs and replacing noise draw and report as the published code does."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ZeroingOptions:
    """The states that are set to zero."""

    state: Annotated[
        list[str] | None,
        Option(
            help="States to set to zero, KIND:WINDOW as for trace; repeat for several. By default mlp:5.",
            show_default=False,
        ),
    ] = None
    target: Annotated[str, Option(help=_TARGET_HELP)] = "label"
    tokens: Annotated[str, Option(help=_TOKENS_HELP + " All chosen ones are zeroed together.")] = "subject"


@dataclass(frozen=True, kw_only=True)
class IntegrationOptions:
    """Which gradients are integrated, and along which path."""

    kind: Annotated[
        list[str] | None,
        Option(help="hidden, mlp or attn; repeat for several. By default all three.", show_default=False),
    ] = None
    steps: Annotated[int, Option(help="Points of the quadrature.")] = 50
    baseline: Annotated[
        str, Option(help="Where the path starts: zero, or corrupted (the state in the corrupted run).")
    ] = "zero"
    target: Annotated[str, Option(help=_TARGET_HELP)] = "argmax"
    tokens: Annotated[str, Option(help=_TOKENS_HELP)] = "all"


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Running text."""

    texts: Annotated[
        str | None,
        Option(
            help="Running text: a .txt file (a text a line), JSON lines or Parquet (with a column of texts), or a "
            "folder of such files; 'demo' are the demo model's training sentences."
        ),
    ] = None
    dataset: Annotated[
        str | None, Option(help="Take a data set instead: a hub id, or a folder of one. Needs the package datasets.")
    ] = None
    dataset_config: Annotated[str | None, Option(help="The data set's configuration, such as wikitext-103-v1.")] = None
    split: Annotated[str, Option(help="The data set's split.")] = "train"
    column: Annotated[str, Option(help="The column that holds the texts.")] = "text"


@dataclass(frozen=True, kw_only=True)
class MomentsFileOptions:
    """The file that results go to."""

    out: Annotated[Path, Option(help="File for the moments, such as moments.safetensors.")]
    resume: Annotated[
        Path | None, Option(help="File that keeps a collection under way; OUT.partial by default.", show_default=False)
    ] = None
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file.")] = False
    quiet: Annotated[bool, Option("--quiet", help="No progress and no summary.")] = False


_LAYERS_HELP = "Layers, counted from 0: all, or numbers such as 0,4,8"


@dataclass(frozen=True, kw_only=True)
class CollectingOptions:
    """Which second moments are collected, of how much text."""

    layers: Annotated[str, Option(help=f"{_LAYERS_HELP}.")] = "all"
    tokens: Annotated[
        str | None,
        Option(help="Tokens to take, or all; by default 10 times the width of the MLP's hidden layer."),
    ] = None
    length: Annotated[
        int | None,
        Option(help="Tokens that see each other, at most; 512 by default, or as many positions as the model has."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class EditMethodOptions:
    """How edits are made, whatever is asked of them and wherever they are made."""

    method: Annotated[
        list[str],
        Option(
            help="METHOD or METHOD:WINDOW: rome, memit, memit_joint (all facts in one change of the weights) or "
            "finetune, and how many layers it edits together; repeat for several."
        ),
    ]
    window: Annotated[
        int | None,
        Option(
            help="Layers edited together, for a METHOD without a WINDOW; by default 5 for MEMIT, 1 for fine-tuning.",
            min=1,
        ),
    ] = None
    preset: Annotated[
        str | None, Option(help="Settings: gptj, gpt2-xl, meng, demo, or a file of your own, FILE.toml[:NAME].")
    ] = None
    changes: Annotated[
        list[str] | None,
        Option(
            "--set",
            help="A hyperparameter of all methods that have it, NAME=VALUE, or of one, METHOD.NAME=VALUE; repeat.",
        ),
    ] = None
    moments: Annotated[
        str | None,
        Option(
            help="Second moments for ROME and MEMIT, of 'causalcone moments' or published with ROME; 'demo' are the "
            "demo model's."
        ),
    ] = None
    texts: Annotated[
        str | None, Option(help="Collect the moments now, from running text as 'causalcone moments' takes it.")
    ] = None
    ridge: Annotated[
        float, Option(help="Share of the moments' mean diagonal added to their diagonals, where they are singular.")
    ] = 0.0
    contexts: Annotated[
        Path | None,
        Option(help="Texts put before prompts: JSON with the lists rome and memit, or another run's run.json."),
    ] = None
    sigma: Annotated[
        str | None,
        Option(help="Noise of Tracing Reversal and Fact Forcing, as for trace. By default the preset's, or 3sd."),
    ] = None
    seed: Annotated[int, Option(help="Seed of all texts that are drawn.")] = 0
    filtered: Annotated[
        bool, Option("--filter/--no-filter", help="Leave out facts that the model does not complete.")
    ] = True
    compat: Annotated[str | None, Option(help="'published': pose problems as the published code does.")] = None

    def moments_path(self) -> str | None:
        """The file of moments, if they are not to be collected now."""
        return None if self.moments is None else path_of(self.moments, "moments")


_PROBLEM_HELP = "error_injection, tracing_reversal, fact_erasure, fact_amplification or fact_forcing"
_AGGREGATE_HELP = "first, or mean. By default the preset's, or first."


@dataclass(frozen=True, kw_only=True)
class EditingOptions(EditMethodOptions):
    """Which edits are made."""

    problem: Annotated[str, Option(help=f"{_PROBLEM_HELP}.")] = "error_injection"
    layers: Annotated[
        str | None,
        Option(
            help=f"{_LAYERS_HELP}: the edited ones, or windows' centres. By default the preset's, without one all.",
            show_default=False,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class TuningOptions(EditMethodOptions):
    """Settings of editing that are tried, and how one is chosen."""

    problem: Annotated[
        list[str] | None,
        Option(help=f"{_PROBLEM_HELP}; repeat for several. By default error_injection.", show_default=False),
    ] = None
    layer: Annotated[int, Option(help="The edited layer, counted from 0, or the windows' centre.", min=0)]
    grid: Annotated[
        list[str] | None,
        Option(
            help="Values to try of a hyperparameter, METHOD.NAME=V1,V2,... or NAME=V1,V2,... of all methods that have "
            "it; repeat, and a method's names are combined. By default kl_factor=0.0625,0.9,1 of ROME and MEMIT, and "
            "norm_constraint=1e-4,5e-5,2e-5,1e-5 of fine-tuning.",
            show_default=False,
        ),
    ] = None
    most: Annotated[float, Option(help="The highest mean rewrite score that a setting may have.", min=0, max=1)] = 0.99
    give_up: Annotated[
        float,
        Option(
            help="How far a setting's mean paraphrase and neighbourhood scores may each be below the best of those "
            "that settings within --most have.",
            min=0,
            max=1,
        ),
    ] = 0.05
    aggregate: Annotated[str | None, Option(help=f"Which paraphrases and neighbours are scored: {_AGGREGATE_HELP}")] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Scores of edited models besides probabilities, and files that are kept of them."""

    essence: Annotated[bool, Option("--essence", help="Perplexity of five texts about each subject.")] = False
    accuracy: Annotated[bool, Option("--accuracy", help="Share of the target's tokens that are the likeliest.")] = False
    generation: Annotated[
        bool, Option("--generation", help="Let edited models write, and measure the entropy of that (slow).")
    ] = False
    references: Annotated[
        Path | None, Option(help="Attribute snippets (JSON) to compare the texts of edited models with.")
    ] = None
    aggregate: Annotated[str | None, Option(help=f"Paraphrases and neighbours in the summary: {_AGGREGATE_HELP}")] = (
        None
    )
    keep_deltas: Annotated[
        bool,
        Option("--keep-deltas", help="Keep every edit's change of weights; fine-tuning's are as large as these."),
    ] = False


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """The folder of a sweep, and how its tables are analysed."""

    folder: Annotated[Path, Argument(metavar="DIR", help="The folder of a sweep, finished or not.")]
    state: Annotated[
        str | None,
        Option(help="Whose tracing effects, such as mlp:5; the first MLP state of the sweep by default."),
    ] = None
    at: Annotated[str, Option(help="Effects: max over the prompt's tokens, or at subject_last.")] = "max"
    denominator: Annotated[str, Option(help="Of restored fractions: p_high (published) or p_clean.")] = "p_high"
    aggregate: Annotated[
        str | None,
        Option(help="Paraphrases and neighbours: first (published) or mean; as the sweep says by default."),
    ] = None
    additive: Annotated[
        bool, Option("--additive", help="Layer and effect without their interaction (published: with it).")
    ] = False
    compat: Annotated[
        str | None,
        Option(help="published: mean effects by layer are of positive effects only; as the sweep says by default."),
    ] = None
    draws: Annotated[int, Option(help="Draws of the bootstrap and the permutation test.", min=100)] = 1000
