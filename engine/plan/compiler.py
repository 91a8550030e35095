"""Compiles an experiment on facts of one shape into a plan: its cone, and of that what the results depend on."""

from __future__ import annotations

import numpy as np

from causalcone.engine.plan.cone import Entries, LayerValues, Shape, find_cone
from causalcone.engine.plan.interventions import Experiment
from causalcone.engine.plan.liveness import Needed, NeededAttention, marked
from causalcone.engine.plan.plan import Captured, Gather, LayerPlan, Plan


def compile_plan(shape: Shape, experiment: Experiment, depth: int, parallel: bool = False) -> Plan:
    """Find the cone of an experiment and keep of it what is read out, last layer first.

    ``parallel``: the MLP reads the layer's input (``Architecture.parallel``).
    """
    cone = find_cone(shape, experiment, depth, parallel)
    last = cone.layers[-1]
    prompts = np.array([base.prompt for base in experiment.bases])[experiment.base]
    tokens = np.array(shape.read)[prompts]
    target_rows = np.take_along_axis(cone.final, tokens, axis=1)
    logit_rows = cone.final[experiment.logits[:, 0], experiment.logits[:, 1]]
    readouts = Needed(marked(len(last.out_varies), target_rows, logit_rows), last.out_varies)
    read = readouts.local[target_rows]
    read_place = np.full(readouts.rows.total, -1)
    read_place[read] = np.arange(tokens.shape[1])

    given = np.array([False, *experiment.varying_vectors])
    outputs = _output_stage(last, readouts.kept)
    read_rows = readouts.gather(outputs, np.arange(len(last.out_varies)))
    layers: list[LayerPlan] = []
    for values, previous in zip(reversed(cone.layers), [*cone.layers[-2::-1], None], strict=True):
        plan, outputs = _compile_layer(values, previous, outputs, parallel, given)
        layers.append(plan)
    kept = Entries(*(column[outputs.kept] for column in vars(cone.entries).values()))
    captures, logits = len(experiment.captures), readouts.local[logit_rows]
    return Plan(shape, parallel, kept, tuple(reversed(layers)), read_rows, read_place, read, logits, captures)


def _output_stage(values: LayerValues, *needed: np.ndarray) -> Needed:
    """The outputs of a layer that are needed later, or captured."""
    return Needed(
        marked(len(values.out_varies), *needed, _captured_values(values, "hidden")), values.out_varies, values.out_given
    )


def _compile_layer(
    values: LayerValues, previous: LayerValues | None, outputs: Needed, parallel: bool, given_varies: np.ndarray
) -> tuple[LayerPlan, Needed]:
    """One layer's plan, and the stage of its input rows, which are the outputs of the layer before."""
    mids, inputs = len(values.mid_varies), len(values.input_varies)
    out_mlp, out_mid = values.out_mlp[outputs.computed], values.out_mid[outputs.computed]

    given = -1 - np.arange(len(given_varies))
    mlp = Needed(
        marked(len(values.mlp_varies) + len(given), out_mlp, _captured_values(values, "mlp")),
        np.concatenate([values.mlp_varies, given_varies]),
        np.concatenate([np.zeros_like(values.mlp_varies, dtype=np.int64), given]),
    )
    mid = Needed(marked(mids, out_mid, *([] if parallel else [mlp.computed])), values.mid_varies)
    attention = NeededAttention(values, given_varies, values.mid_attn[mid.kept], _captured_values(values, "attn"))

    needed = [values.mid_input[mid.kept], attention.queries.kept, attention.keys.kept]
    needed += [mlp.computed] if parallel else []
    if previous is None:
        stage = Needed(marked(inputs, *needed), values.input_varies)
    else:
        stage = _output_stage(previous, *needed)

    segments = attention.segments()
    stages = {"attn": attention.local, "mlp": mlp.local, "hidden": outputs.local}
    identity = np.arange(max(mids, inputs))
    plan = LayerPlan(
        inputs=stage.rows,
        keys_values=attention.keys.gather(stage, identity),
        key_tokens=values.token[attention.keys.kept],
        queries=attention.queries.gather(stage, identity),
        query_tokens=values.token[attention.queries.kept],
        attn=attention.rows,
        segments=segments,
        mix=attention.mix(),
        attn_given=attention.given.given,
        mid_input=mid.gather(stage, values.mid_input),
        mid_attn=Gather(mid.rows, attention.local[values.mid_attn[mid.kept]]),
        mlp=Gather(mlp.rows, (stage if parallel else mid).local[mlp.computed]),
        mlp_given=mlp.given,
        out_mid=outputs.gather(mid, values.out_mid),
        out_mlp=outputs.gather(mlp, values.out_mlp),
        out_given=outputs.given,
        captured={site: Captured(number, stages[site][value]) for site, (number, value) in values.captured.items()},
    )
    return plan, stage


def _captured_values(values: LayerValues, site: str) -> np.ndarray:
    return values.captured[site][1] if site in values.captured else np.empty(0, dtype=np.int64)
