"""Compiles an experiment on facts of one shape into a plan: its cone, and of that only the values that results need."""

from __future__ import annotations

import numpy as np

from causalcone.engine.plan.cone import Entries, LayerValues, Shape, distinct, find_cone
from causalcone.engine.plan.interventions import Experiment
from causalcone.engine.plan.plan import INDEX, Captured, Gather, Given, LayerPlan, Mix, Plan, Rows, Segment


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

    given_varies = np.array([False, *experiment.varying_vectors])
    outputs = _output_stage(last, readouts.values)
    read_rows = readouts.gather(outputs, np.arange(len(last.out_varies)))
    layers: list[LayerPlan] = []
    for values, previous in zip(reversed(cone.layers), [*cone.layers[-2::-1], None], strict=True):
        plan, outputs = _compile_layer(values, previous, outputs, parallel, given_varies)
        layers.append(plan)
    entries = Entries(*(column[outputs.values] for column in vars(cone.entries).values()))
    return Plan(
        shape=shape,
        parallel=parallel,
        entries=entries,
        layers=tuple(reversed(layers)),
        read_rows=read_rows,
        read_place=read_place,
        read=read,
        logits=readouts.local[logit_rows],
        captures=len(experiment.captures),
    )


def _output_stage(values: LayerValues, *needed: np.ndarray) -> Needed:
    """The outputs of a layer that are needed later, or captured."""
    mask = marked(len(values.out_varies), *needed, values.captured["hidden"][1])
    return Needed(mask, values.out_varies, values.out_given)


def _compile_layer(
    values: LayerValues, previous: LayerValues | None, outputs: Needed, parallel: bool, given_varies: np.ndarray
) -> tuple[LayerPlan, Needed]:
    """One layer's plan, and the stage of its input rows, which are the outputs of the layer before."""
    mids, inputs = len(values.mid_varies), len(values.inputs.varies)
    out_mlp, out_mid = values.out_mlp[outputs.computed], values.out_mid[outputs.computed]

    sources = -1 - np.arange(len(given_varies))
    mlp = Needed(
        marked(len(values.mlp_varies) + len(sources), out_mlp, values.captured["mlp"][1]),
        np.concatenate([values.mlp_varies, given_varies]),
        np.concatenate([np.zeros_like(values.mlp_varies, dtype=np.int64), sources]),
    )
    mid = Needed(marked(mids, out_mid, *([] if parallel else [mlp.computed])), values.mid_varies)
    attention = NeededAttention(values, given_varies, values.mid_attn[mid.values], values.captured["attn"][1])

    needed = [values.mid_input[mid.values], attention.queries.values, attention.keys.values]
    needed += [mlp.computed] if parallel else []
    if previous is None:
        stage = Needed(marked(inputs, *needed), values.inputs.varies)
    else:
        stage = _output_stage(previous, *needed)

    segments = attention.segments()
    rows_of = {"attn": attention.local, "mlp": mlp.local, "hidden": outputs.local}
    identity = np.arange(inputs)
    plan = LayerPlan(
        inputs=stage.rows,
        keys_values=attention.keys.gather(stage, identity),
        key_tokens=values.inputs.token[attention.keys.values].astype(INDEX),
        queries=attention.queries.gather(stage, identity),
        query_tokens=values.inputs.token[attention.queries.values].astype(INDEX),
        attn=attention.rows,
        segments=segments,
        mix=attention.mix(),
        attn_given=attention.given.given,
        mid_input=mid.gather(stage, values.mid_input),
        mid_attn=Gather(mid.rows, attention.local[values.mid_attn[mid.values]]),
        mlp=Gather(mlp.rows, (stage if parallel else mid).local[mlp.computed]),
        mlp_given=mlp.given,
        out_mid=outputs.gather(mid, values.out_mid),
        out_mlp=outputs.gather(mlp, values.out_mlp),
        out_given=outputs.given,
        captured={site: Captured(of, rows_of[site][at]) for site, (of, at) in values.captured.items() if len(of)},
    )
    return plan, stage


def marked(size: int, *numbers: np.ndarray) -> np.ndarray:
    """(size,) true at the numbers."""
    mask = np.zeros(size, dtype=bool)
    for number in numbers:
        mask[number] = True
    return mask


class Needed:
    """The values of a stage that are needed, in row order: those it computes, shared first, then those given (where
    ``source`` is negative), shared first.

    values: their numbers; computed: those of the rows it computes; local: the row of each value, -1 if not needed.
    """

    def __init__(self, needed: np.ndarray, varies: np.ndarray, source: np.ndarray | None = None) -> None:
        source = np.zeros(len(needed), dtype=np.int64) if source is None else source
        order = [
            np.flatnonzero(needed & ((source < 0) == is_given) & (varies == varying))
            for is_given in (False, True)
            for varying in (False, True)
        ]
        counts = [len(numbers) for numbers in order]
        self.values = np.concatenate(order)
        self.rows = Rows(*counts[:2])
        self.computed = self.values[: self.rows.total]
        self.given = Given(Rows(*counts[2:]), source[self.values[self.rows.total :]])
        self.local = np.full(len(needed), -1, dtype=INDEX)
        self.local[self.values] = np.arange(len(self.values))

    def gather(self, source: Needed, value: np.ndarray) -> Gather:
        """Where each row that this stage computes finds its ``value`` among the source's rows."""
        return Gather(self.rows, source.local[value[self.computed]])


def _rows_alike(there: np.ndarray) -> np.ndarray:
    """The number of each row of a bool array (n, T) among the distinct ones."""
    numbers = np.zeros(len(there), dtype=np.int64)
    for first in range(0, there.shape[1], 32):
        columns = there[:, first : first + 32]
        _, numbers = distinct(numbers << 32 | columns @ (1 << np.arange(columns.shape[1])))
    return numbers


class NeededAttention:
    """What attention computes in a layer of which the outputs ``needed`` are read: segments of attention rows, mixes of
    their heads, given rows, and the queries and keys that they come from.

    local: the row of each attention output, mixes and given ones after the computed ones, -1 if not needed.
    """

    def __init__(self, values: LayerValues, given_varies: np.ndarray, *needed: np.ndarray) -> None:
        self.layer_values = values
        self.count, mixes = len(values.attn_varies), values.mixes
        ends = self.count, self.count + len(mixes.base)
        read = marked(ends[1] + len(given_varies), *needed)
        self.mixes = Needed(read[ends[0] : ends[1]], mixes.varies)
        self.patches = np.flatnonzero(self.mixes.local[mixes.row] >= 0)
        sources = mixes.source[self.patches]
        self.attn = read[: self.count]
        self.attn |= marked(self.count, mixes.base[self.mixes.values], sources[sources < self.count])
        self.given = Needed(read[ends[1] :], given_varies, -1 - np.arange(len(given_varies)))

        self.state, varies = values.inputs.state, values.inputs.varies
        self.query_of = self.state[values.attn_run, values.attn_token]
        self.queries = Needed(marked(len(varies), self.query_of[self.attn]), varies)
        self.keys = Needed(marked(len(varies), self._seen()), varies)
        self.rows = Rows(*(int((self.attn & (values.attn_varies == varies)).sum()) for varies in (False, True)))
        self.local = np.full(len(read), -1, dtype=INDEX)
        after = np.concatenate([ends[0] + self.mixes.values, ends[1] + self.given.values])
        self.local[after] = self.rows.total + np.arange(len(after))

    def _querying(self, attn: np.ndarray) -> np.ndarray:
        """(A, T) which of each run's tokens stand for an attention output, and which output that is (else -1)."""
        output = np.full(self.state.shape, -1)
        output[self.layer_values.attn_run[attn], self.layer_values.attn_token[attn]] = np.flatnonzero(attn)
        return output

    def _seen(self) -> np.ndarray:
        """The input rows whose keys and values the attention outputs see: all of a run's up to its last query."""
        querying = self._querying(self.attn) >= 0
        return self.state[np.logical_or.accumulate(querying[:, ::-1], axis=1)[:, ::-1]]

    def segments(self) -> tuple[Segment, ...]:
        """Batches of the runs that query for the same tokens; numbers the attention rows in the batches' order."""
        segments: list[Segment] = []
        first = 0
        for varying in (False, True):
            output = self._querying(self.attn & (self.layer_values.attn_varies == varying))
            which = _rows_alike(output >= 0)
            for index in range(which.max(initial=-1) + 1):
                runs = np.flatnonzero(which == index)
                tokens = np.flatnonzero(output[runs[0]] >= 0)
                if not len(tokens):
                    continue
                outputs = output[np.ix_(runs, tokens)]
                self.local[outputs] = first + np.arange(outputs.size).reshape(outputs.shape)
                queries = self.queries.local[self.query_of[outputs]]
                keys, querying = self.keys.local[self.state[runs, : tokens[-1] + 1]], tuple(tokens.tolist())
                segments.append(Segment(varying=varying, first=first, tokens=querying, queries=queries, keys=keys))
                first += outputs.size
        return tuple(segments)

    def mix(self) -> Mix:
        """The mixes, once the segments have numbered the attention rows that they are put together from."""
        mixes = self.layer_values.mixes
        source = mixes.source[self.patches]
        rows = np.where(source < self.count, self.local[np.minimum(source, self.count - 1)], self.count - 1 - source)
        base = Gather(self.mixes.rows, self.local[mixes.base[self.mixes.values]])
        return Mix(base, self.mixes.local[mixes.row[self.patches]], mixes.head[self.patches], rows)
