// Charts of the whole study.

// --- the answer ---

function drawR2() {
  const rows = data.r2.filter((row) => row.score === at("r2-score").value && row.r2_layer != null);
  const groups = [rows.map((row) => words(row.problem)), rows.map((row) => row.name)];
  const hover = rows.map((row) =>
    `R² layer ${number(row.r2_layer)}, trace ${number(row.r2_trace)}, both ${number(row.r2_both)}<br>` +
    `tracing adds ${number(row.diff, 4)}` +
    (row.diff_low == null ? "" : ` (95 % ${number(row.diff_low, 4)} to ${number(row.diff_high, 4)})`) +
    `<br>by chance ${number(row.chance, 4)}; p: F-test ${number(row.p, 4)}, permutation ${number(row.p_permutation, 4)}` +
    (row.permutation_facts < row.facts ? ` (of the ${row.permutation_facts} facts that have all layers)` : "") +
    `<br>n: ${count(row.edits, "edit")} of ${count(row.facts, "fact")}` +
    [row.note, row.tests].filter(Boolean).map((note) => `<br>${plain(note).replace(/; /g, "<br>")}`).join(""));
  const chance = rows.map((row) => row.chance == null || row.permutation_facts < row.facts ? null : row.r2_layer + row.chance);
  const interval = (of) => ({
    type: "data", thickness: 1.5, color: colors().front, array: rows.map((row) => Math.max(0, row[of + "_high"] - row[of])),
    arrayminus: rows.map((row) => row[of + "_low"] == null ? 0 : Math.max(0, row[of] - row[of + "_low"])),
  });
  const { record } = data, recorded = rows.filter((row) => row.record_r2_layer != null);
  const size = (row) => [["record_edits", "edit"], ["record_facts", "fact"]].filter(([key]) => row[key] != null)
    .map(([key, word]) => count(row[key], word)).join(" of ") + (row.record_layers ? ` at ${count(row.record_layers, "layer")}` : "") || "n not printed";
  const marks = (name, key, symbol) => recorded.length ? [{
    type: "scatter", mode: "markers", name: `on record: ${name}`, y: rows.map((row) => row[key]), x: groups,
    hovertext: rows.map((row) => `${plain(record)}, ${name}: R² ${number(row[key])}<br>n: ${size(row)}`), hoverinfo: "text",
    marker: { symbol, size: 11, color: colors().front, line: { width: 2 } },
  }] : [];
  const tested = rows.filter((row) => row.diff_low != null), lines = chance.filter((value) => value != null);
  const bar = { type: "bar", x: groups, hovertext: hover, hoverinfo: "text" };
  const untested = rows.filter((row) => row.p == null || row.note);
  const note = `n: ${range(rows.map((row) => row.edits), "edit")} of ${range(rows.map((row) => row.facts), "fact")} per pair of bars. ` +
    (tested.length ? `Vertical lines: 95 % intervals (bootstrap over facts, ${data.draws} draws); those of what tracing adds are under the pointer. ` :
      "No intervals: facts are drawn again for these, and there is one. ") +
    (lines.length ? "Lines across: what layer and the effects of other facts explain by chance. " : "") +
    untested.map((row) => `${row.name} in ${row.problem.replace(/_/g, " ")}: ${row.note ?? "no test"}. `).join("") +
    (recorded.length ? `Open marks: on record, ${record} (${unique(recorded.map(size)).join("; ")}), without intervals.` : "");
  draw("r2", rows.length ? [
    { ...bar, name: "edit layer", y: rows.map((row) => row.r2_layer), marker: { color: sky }, error_y: interval("r2_layer") },
    {
      ...bar, name: "edit layer and tracing effect", y: rows.map((row) => row.r2_both),
      marker: { color: orange, pattern: { shape: "/" } }, error_y: interval("r2_both"),
    },
    {
      type: "scatter", mode: "markers", name: "by chance", x: groups, y: chance, hoverinfo: "skip",
      marker: { symbol: "line-ew-open", size: 16, color: colors().front, line: { width: 2 } },
    },
    {
      type: "scatter", mode: "text", showlegend: false, x: groups, y: rows.map(() => 1.08), hoverinfo: "skip",
      text: rows.map((row) => number(row.diff).replace(/^(?!-)/, "+")), textfont: { size: 10 },
    },
    ...marks("edit layer", "record_r2_layer", "circle-open"), ...marks("edit layer and tracing effect", "record_r2_both", "diamond-open"),
  ] : [], { barmode: "group", yaxis: { title: { text: "R²" }, range: [0, 1.15] }, height: 380 }, note);
}

// --- scores, windows and averages ---

const editLayers = data.edits?.layers ?? [];
const ticks = (layers) => layers.length < 3 ? { tickvals: layers } : {};

function drawScores() {
  const lines = data.scores.filter((row) =>
    row.problem === at("scores-problem").value && row.score === at("scores-score").value);
  draw("scores", lines.map((row, index) => line(index, {
    name: row.name, x: row.layer, y: row.mean, error_y: bars(row.standard_error),
  })), {
    showlegend: true, yaxis: { range: [-0.03, 1.05], title: { text: "mean score" } }, xaxis: { title: { text: "edited layer" }, ...ticks(editLayers) },
  }, `Means over ${range(lines.map((row) => row.n), "edit")} of ${range(lines.map((row) => row.facts), "fact")} at a layer; ${overFacts(lines)}.`);
}

function drawWindows() {
  draw("windows", data.windows.map((row, index) => line(index, {
    name: row.name, x: row.layer, y: row.mean, error_y: bars(row.standard_error),
  })), { yaxis: { rangemode: "tozero", title: { text: "fraction restored" } }, xaxis: { title: { text: "layer" } } },
  "The largest fraction of p(target) restored at any token, by (centre) layer: means over " +
    `${range(data.windows.map((row) => row.facts), "fact")}; ${overFacts(data.windows)}.`);
}

function drawAverages() {
  const rows = data.averages.filter((row) => row.state === at("averages-state").value);
  const recorded = rows.filter((row) => row.record_effect?.some((value) => value != null));
  const traces = rows.map((row, index) => line(index, {
    name: words(row.role), legendgroup: row.role, x: row.layer, y: row.effect, error_y: bars(row.standard_error),
  }));
  recorded.forEach((row) => traces.push({
    ...traces[rows.indexOf(row)], showlegend: false, mode: "markers", y: row.record_effect, error_y: bars(row.record_standard_error),
    marker: { ...traces[rows.indexOf(row)].marker, symbol: traces[rows.indexOf(row)].marker.symbol + "-open" }, opacity: 0.7,
  }));
  draw("averages", traces, { yaxis: { title: { text: "effect on p(target)" } }, xaxis: { title: { text: "layer" } } },
    `Average indirect effects: means over ${range(rows.map((row) => row.facts), "fact")}; ${overFacts(rows)}.` + (recorded.length ?
      ` Open marks: on record, ${data.record}, over ${range(recorded.map((row) => row.record_facts), "fact")}, with their own intervals.` : ""));
}

// --- sequences ---

const SCORED = { newest: "newest batch", earlier: "sample of all before it" };
const SEQUENCE_AXES = { // a small change is not to look like a large one
  perplexity_ratio: (most) => ({ type: "log", range: [Math.log10(0.9), Math.log10(Math.max(2.2, 1.1 * most))] }),
  relative_norm: () => ({ rangemode: "tozero" }),
};

function drawSequences() {
  const [problem, metric] = ["problem", "metric"].map((name) => at(`sequences-${name}`).value);
  const lines = data.sequences.lines.filter((row) => row.problem === problem && row.metric === metric);
  fill("sequences", data.sequences.rows.filter((row) => row.problem === problem).map((row) =>
    [row.name, row.edits, SCORED[row.group], row.rewrite_p, row.efficacy_score, row.paraphrase_score, row.neighborhood_score,
      row.perplexity_ratio, row.relative_norm]));
  if (!lines.length) return;
  const names = unique(lines.map((row) => row.name)), most = Math.max(...lines.flatMap((row) => row.post));
  draw("sequences-plot", lines.map((row) => {
    const drawn = line(names.indexOf(row.name), {
      name: row.name + (row.group in SCORED ? `, ${SCORED[row.group]}` : ""), x: row.edits, y: row.post, error_y: bars(row.se),
    });
    return { ...drawn, line: { ...drawn.line, dash: row.group === "earlier" ? "dash" : "solid" } };
  }), {
    showlegend: true, xaxis: { title: { text: "edits made" }, rangemode: "tozero" },
    yaxis: { title: { text: words(metric) }, ...(SEQUENCE_AXES[metric]?.(most) ?? {}) },
  }, metric in SEQUENCE_AXES ? "Of the model as a whole: held-out text's perplexity over that before, and the largest norm of a layer's change over that of its weights." :
    `Means over ${range(lines.map((row) => row.n), "edit")}; bars: 1.96 standard errors.`);
}
