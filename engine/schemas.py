"""Columns of every table of results, as Arrow schemas (docs/results.md), and names in them. Probabilities are float64,
layers and tokens count from 0, columns that do not apply to a row are null."""

from typing import Literal, get_args

import pyarrow as pa

from causalcone.engine.errors import CausalconeError

SCHEMA_VERSION = 2
"""Of the columns below; every table and run.json carry it."""

VERSION_KEY = b"causalcone_schema"
"""Its name in the metadata of Parquet files."""

ADDED = frozenset(
    [
        *("joiner", "joined", "likeliest", "key_alignment", "relative_norm", "suspect", "prompt_name", "condition"),
        *("answer_tokens", "logp_clean", "logp_corrupted", "logp_patched"),
        *("answer_tokens_other", "logp_pre", "logp_post", "logp_pre_other", "logp_post_other"),
    ]
)
"""Columns that tables of version 1 may lack. Reading makes them null there, log-probabilities those of the
probabilities."""

Problem = Literal["error_injection", "tracing_reversal", "fact_erasure", "fact_amplification", "fact_forcing"]
PROBLEMS: tuple[Problem, ...] = get_args(Problem)
ERROR_INJECTION, TRACING_REVERSAL, FACT_ERASURE, FACT_AMPLIFICATION, FACT_FORCING = PROBLEMS

PROMPT_KINDS = ("rewrite", "paraphrase", "neighborhood", "attribute")
"""Of the prompts that every fact may have; the fact's own probes are called by their group."""

_TEXT, _COUNT, _NUMBER, _FLAG = pa.string(), pa.int32(), pa.float64(), pa.bool_()


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema(list(columns.items()))


def refuse_newer(version: int, place: object, error: type[CausalconeError] = CausalconeError) -> None:
    """An ``error`` for tables that a later causalcone has written, whose columns may mean something else."""
    if version > SCHEMA_VERSION:
        known = f"this causalcone knows versions up to {SCHEMA_VERSION}; install the one that wrote it, or a later one"
        raise error(f"{place} has version {version} of the tables' columns; {known}")


# One row per restored or zeroed state of a fact.
TRACE_SCHEMA = _schema(
    fact_id=_TEXT,
    method=_TEXT,  # restore, sever_mlp, sever_attn, sever_both or zero
    kind=_TEXT,  # hidden, mlp, attn or head.N
    window=_COUNT,  # layers in the window
    layer=_COUNT,  # its centre
    token=_COUNT,  # of the prompt; null: several tokens together
    token_text=_TEXT,
    subject_start=_COUNT,
    subject_end=_COUNT,  # exclusive
    prompt_tokens=_COUNT,
    p_clean=_NUMBER,
    p_corrupted=_NUMBER,  # null where there is no corrupted run
    p_patched=_NUMBER,  # restored or zeroed
    p_patched_sd=_NUMBER,  # over noise samples, unbiased; null for one sample
    answer_tokens=_COUNT,  # of the target, whose probability p is
    logp_clean=_NUMBER,  # log p_clean, also where p is too small for a number
    logp_corrupted=_NUMBER,
    logp_patched=_NUMBER,
)

# One row per state of a fact: its integrated gradients.
GRADIENT_SCHEMA = _schema(
    fact_id=_TEXT,
    kind=_TEXT,
    layer=_COUNT,
    token=_COUNT,
    norm=_NUMBER,  # L2 norm of the attribution
    total=_NUMBER,  # its sum
    gap=_NUMBER,  # the sum less the change of p along the path
)

# One row per edit.
EDIT_SCHEMA = _schema(
    edit_id=_TEXT,
    fact_id=_TEXT,
    problem=_TEXT,  # one of PROBLEMS
    method=_TEXT,
    layer=_COUNT,  # centre of the window
    window=_COUNT,
    steps=_COUNT,  # that were taken
    loss=_NUMBER,  # the last; null where it is not finite
    delta_norm=_NUMBER,  # Frobenius norm of the change
    status=_TEXT,  # done or failed
    reason=_TEXT,  # of a failure
    key_alignment=_NUMBER,  # the key that ROME solves for over the one it is to be like, along the edit's direction
    relative_norm=_NUMBER,  # delta_norm over the norm of the changed weights
    suspect=_TEXT,  # why the edit is out of the ordinary
)

# One row per edit and prompt.
PROBE_SCHEMA = _schema(
    edit_id=_TEXT,
    prompt_kind=_TEXT,  # rewrite, paraphrase, neighborhood or attribute; of a fact's own probes their group
    prompt_index=_COUNT,
    p_pre=_NUMBER,  # of the problem's target, before the edit; in probes of the likeliest accepted answer
    p_post=_NUMBER,  # and after it
    p_pre_other=_NUMBER,  # of the other target
    p_post_other=_NUMBER,
    answer_tokens=_COUNT,  # of the problem's target; in probes of the answer that was the likeliest before the edit
    answer_tokens_other=_COUNT,
    logp_pre=_NUMBER,  # log p_pre, also where p is too small for a number
    logp_post=_NUMBER,
    logp_pre_other=_NUMBER,
    logp_post_other=_NUMBER,
    prompt_name=_TEXT,  # of a probe that has one
    condition=_FLAG,  # whether what must hold before the edit did; null where nothing must
)

# One row per edit and prompt that models wrote a text after.
TEXT_SCHEMA = _schema(
    edit_id=_TEXT,
    prompt_kind=_TEXT,  # generation, or as in probes
    prompt_index=_COUNT,
    prompt=_TEXT,
    before=_TEXT,  # what the model wrote after the prompt, before the edit
    after=_TEXT,  # and after it; null where it failed
)

# One row per edit and metric, with its values before and after the edit.
METRIC_SCHEMA = _schema(edit_id=_TEXT, metric=_TEXT, pre=_NUMBER, post=_NUMBER)

# One row per edit of a sequence: the columns of edits, and when it was made.
SEQUENCE_SCHEMA = pa.schema([*EDIT_SCHEMA, *_schema(batch=_COUNT, position=_COUNT, seconds=_NUMBER)])
"""batch: from 0; position: among all edits, from 0; seconds: that its batch took."""

# One row per checkpoint of a sequence, edit that is scored there (or the model), and metric.
CHECKPOINT_SCHEMA = _schema(
    problem=_TEXT,
    method=_TEXT,
    window=_COUNT,
    layer=_COUNT,
    edits=_COUNT,  # made so far
    group=_TEXT,  # newest: an edit of the last batch; earlier: one before it; model: the model as a whole
    fact_id=_TEXT,  # null of the model
    # as of edits, and rewrite_p, ...: the target's mean p on that kind of prompt; of the model perplexity of held-out
    # text, relative_norm.LAYER: the norm of the change over that of the weights, and null_space_rank.LAYER
    metric=_TEXT,
    pre=_NUMBER,  # in the unedited model
    post=_NUMBER,  # now
)

# One row per fact that a sweep's filter has seen.
FILTER_SCHEMA = _schema(
    fact_id=_TEXT,
    said=_TEXT,  # 36 greedy tokens
    completes=_FLAG,  # whether they hold the answer
    argmax=_FLAG,  # whether the answer is the model's first choice
    p_true=_NUMBER,
    joiner=_TEXT,  # what stands between prompt and answer: space or none
    joined=_FLAG,  # whether the answer's tokens are those of the joined text, not those that it has alone
    likeliest=pa.list_(pa.struct({"token": _TEXT, "p": _NUMBER})),  # the next tokens after the prompt, five of them
)

# One row per fact of a sweep; the columns of the filter are null where it has not been.
FACT_SCHEMA = pa.schema(
    [
        *_schema(
            fact_id=_TEXT,
            prompt=_TEXT,
            subject=_TEXT,
            target_true=_TEXT,
            target_new=_TEXT,
            relation_id=_TEXT,
            paraphrase_prompts=_COUNT,
            neighborhood_prompts=_COUNT,
            fact=_TEXT,  # all of it, as JSON
        ),
        *list(FILTER_SCHEMA)[1:],
    ]
)

# One row per unit of a sweep that failed, and per fact that a unit could not use.
FAILURE_SCHEMA = _schema(unit=_TEXT, stage=_TEXT, items=_COUNT, reason=_TEXT)
LEFT_OUT_SCHEMA = _schema(fact_id=_TEXT, unit=_TEXT, reason=_TEXT)
