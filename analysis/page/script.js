"use strict";
(async function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const numbers = await inflate(document.getElementById("numbers").textContent.trim());
  const at = (id) => document.getElementById(id);
  const { blue, vermilion, green, purple, orange, sky } = data.colors;
  const STYLES = [ // marks and dashes tell lines apart in grey
    [blue, "circle", "solid"], [vermilion, "square", "dash"], [green, "triangle-up", "dashdot"],
    [purple, "diamond", "dot"], [orange, "x", "longdash"], [sky, "cross", "solid"],
  ];
  const CONFIG = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  const MOST_ROWS = 200;

  async function inflate(text) {
    if (!text) return new Float32Array(0);
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Float32Array(await new Response(stream).arrayBuffer());
  }

  // Plotly reads some tags and entities in texts
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const words = (name) => { const text = String(name).replace(/_/g, " "); return text[0].toUpperCase() + text.slice(1); };
  const number = (value, digits = 3) =>
    value == null || Number.isNaN(value) ? "–" : value.toFixed(digits).replace(/^-(0\.0*)$/, "$1");
  const unique = (values) => [...new Set(values)];
  const shown = (text) => text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";

  function colors() {
    const style = getComputedStyle(document.body);
    return { front: style.color, back: style.backgroundColor, line: style.getPropertyValue("border-color") || "#888" };
  }

  function layout(more) {
    const { front } = colors();
    const axis = { gridcolor: "rgba(128,128,128,.25)", zerolinecolor: "rgba(128,128,128,.5)", automargin: true };
    const { xaxis, yaxis, ...rest } = more;
    if (rest.title) rest.title = { font: { size: 13 }, x: 0, xref: "paper", y: 1, yref: "container", yanchor: "top", pad: { t: 6 }, ...rest.title };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: front, size: 12 },
      margin: { l: 50, r: 15, t: 40, b: 44 }, height: 340, autosize: true,
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
      modebar: { orientation: "v", bgcolor: "rgba(0,0,0,0)", color: "rgba(128,128,128,.7)", activecolor: front },
      xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
    };
  }

  function draw(id, traces, more) {
    const element = typeof id === "string" ? at(id) : id;
    element.hidden = traces.length === 0;
    if (traces.length) Plotly.react(element, traces, layout(more), CONFIG);
  }

  function options(id, values, label = words) {
    const select = at(id);
    select.replaceChildren(...values.map((value) => new Option(label(value), value)));
    select.disabled = values.length < 2;
    return select;
  }

  const line = (index, more) => {
    const [color, symbol, dash] = STYLES[index % STYLES.length];
    return { mode: "lines+markers", line: { color, dash, width: 2 }, marker: { color, symbol, size: 7 }, ...more };
  };

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
      (row.published_r2_layer == null ? "" :
        `<br>published: layer ${row.published_r2_layer}, trace ${row.published_r2_trace}, both ${row.published_r2_both}`));
    const bar = { type: "bar", x: groups, hovertext: hover, hoverinfo: "text" };
    const chance = rows.map((row) => row.chance == null || row.permutation_facts < row.facts ? null : row.r2_layer + row.chance);
    draw("r2", rows.length ? [
      { ...bar, name: "edit layer", y: rows.map((row) => row.r2_layer), marker: { color: sky } },
      {
        ...bar, name: "edit layer and tracing effect", y: rows.map((row) => row.r2_both),
        marker: { color: orange, pattern: { shape: "/" } }, text: rows.map((row) => number(row.diff).replace(/^(?!-)/, "+")),
        textposition: "outside", textfont: { size: 10 }, cliponaxis: false,
      },
      {
        type: "scatter", mode: "markers", name: "by chance", x: groups, y: chance, hoverinfo: "skip",
        marker: { symbol: "line-ew-open", size: 16, color: colors().front, line: { width: 2 } },
      },
    ] : [], { barmode: "group", yaxis: { title: { text: "R²" }, range: [0, 1.12] }, height: 380 });
  }

  // --- scores and windows ---

  function drawScores() {
    const lines = data.scores.filter((row) =>
      row.problem === at("scores-problem").value && row.score === at("scores-score").value);
    draw("scores", lines.map((row, index) => line(index, {
      name: row.name, x: row.layer, y: row.mean,
      error_y: { type: "data", array: row.standard_error.map((error) => error == null ? 0 : 1.96 * error), thickness: 1 },
    })), { yaxis: { range: [-0.03, 1.05], title: { text: "mean score" } }, xaxis: { title: { text: "edited layer" } } });
  }

  function drawWindows() {
    draw("windows", data.windows.map((row, index) => line(index, {
      name: `${row.kind}:${row.window}`, x: row.layer, y: row.mean,
    })), { yaxis: { rangemode: "tozero", title: { text: "fraction restored" } }, xaxis: { title: { text: "layer" } } });
  }

  // --- one fact ---

  const facts = data.facts.map((fact, index) => ({
    ...fact, index, text: fact.prompt.replace("{}", fact.subject),
    key: [fact.id, fact.subject, fact.prompt, fact.true, fact.new].join(" ").toLowerCase(),
  }));
  let current = facts[0];

  function search() {
    const query = at("search").value.trim().toLowerCase();
    const matches = facts.filter((fact) => fact.key.includes(query));
    at("facts").replaceChildren(...matches.slice(0, 500).map((fact) => new Option(fact.subject + " — " + fact.true, fact.index)));
    at("found").textContent = `${matches.length} of ${facts.length} facts` + (matches.length > 500 ? ", the first 500 are listed" : "");
    if (matches.length && !matches.includes(current)) current = matches[0];
    at("facts").value = String(current.index);
    drawFact();
  }

  function drawFact() {
    const fact = current, text = at("fact-text");
    const subject = document.createElement("mark");
    subject.textContent = fact.subject;
    const [before, after] = fact.prompt.split("{}");
    text.replaceChildren(before, subject, after ?? "", " → ", fact.true, fact.new ? ` (new: ${fact.new})` : "");
    drawMaps(fact);
    drawSevered(fact);
    drawZeroed(fact);
    drawEdits(fact);
    drawTexts(fact);
  }

  function drawMaps(fact) {
    const maps = at("maps"), traced = data.grids && data.grids.facts[fact.index];
    if (!traced) { maps.replaceChildren("This fact was not traced."); return; }
    const { states, layers } = data.grids, length = traced.tokens.length;
    while (maps.children.length < states.length || maps.firstChild?.nodeType === 3) {
      if (maps.firstChild?.nodeType === 3) maps.replaceChildren();
      else maps.append(document.createElement("div"));
    }
    const labels = traced.tokens.map((token, index) =>
      (index >= traced.span[0] && index < traced.span[1] ? "<b>" + plain(shown(token)) + "*</b>" : plain(shown(token))) +
      "\u200b".repeat(index)); // labels of equal tokens must differ
    let high = traced.clean;
    for (let index = 0; index < states.length * layers * length; index++) {
      const value = numbers[traced.at + index];
      if (value > high) high = value;
    }
    const scales = { hidden: "Purples", mlp: "Greens", attn: "Reds" };
    states.forEach(([kind, size], state) => {
      const grid = Array.from({ length }, (_, token) => Array.from({ length: layers }, (_, layer) => {
        const value = numbers[traced.at + (state * layers + layer) * length + token];
        return Number.isNaN(value) ? null : value;
      }));
      const texts = grid.map((row, token) => row.map((value, layer) =>
        `${plain(shown(traced.tokens[token]))}, layer ${layer}<br>p(target) ${value == null ? "–" : value.toPrecision(5)}`));
      draw(maps.children[state], [{
        type: "heatmap", z: grid, y: labels, zmin: traced.corrupted, zmax: Math.max(high, traced.corrupted * (1 + 1e-9)) || 1,
        colorscale: shades(scales[kind] || "Blues"), xgap: 1, ygap: 1, text: texts, hoverinfo: "text",
        colorbar: { thickness: 10, tickfont: { size: 10 } },
      }], {
        title: { text: `Restoring ${plain(kind)}:${size}` }, height: 120 + 20 * length,
        yaxis: { autorange: "reversed", tickfont: { size: 11 } }, xaxis: { title: { text: size === 1 ? "layer" : "centre layer" } },
      });
    });
  }

  const SHADES = {
    Purples: ["#fcfbfd", "#9e9ac8", "#3f007d"], Greens: ["#f7fcf5", "#74c476", "#00441b"],
    Reds: ["#fff5f0", "#fb6a4a", "#67000d"], Blues: ["#f7fbff", "#6baed6", "#08306b"],
  };
  const shades = (name) => SHADES[name].map((color, index) => [index / 2, color]);

  function slice(table, fact, part, layers) {
    const start = table.at + (fact.index * table.parts.length + part) * layers;
    return Array.from(numbers.subarray(start, start + layers), (value) => Number.isNaN(value) ? null : value);
  }

  function drawSevered(fact) {
    const { severed } = data, grid = data.grids && data.grids.facts[fact.index];
    const traces = [];
    if (severed && grid) {
      const hidden = data.grids.states.findIndex(([kind, size]) => kind === "hidden" && size === 1);
      const names = { sever_mlp: "MLP severed", sever_attn: "attention severed", sever_both: "both severed" };
      const restored = (values) => values.map((value) => value == null ? null : value - grid.corrupted);
      const x = Array.from({ length: severed.layers }, (_, layer) => layer);
      if (hidden >= 0) {
        const { layers } = data.grids, length = grid.tokens.length, last = grid.span[1] - 1;
        const plainRun = x.map((layer) => numbers[grid.at + (hidden * layers + layer) * length + last]);
        traces.push(line(0, { name: "nothing severed", x, y: restored(plainRun) }));
      }
      severed.parts.forEach((part, index) => {
        const values = slice(severed, fact, index, severed.layers);
        if (values.some((value) => value != null)) traces.push(line(index + 1, { name: names[part], x, y: restored(values) }));
      });
    }
    draw("severed", traces, {
      title: { text: "Last subject token, severed" }, height: 330, margin: { l: 50, r: 15, t: 84, b: 44 },
      yaxis: { title: { text: "effect on p(target)" } }, xaxis: { title: { text: "layer" } },
    });
  }

  function drawZeroed(fact) {
    const { zeroed } = data, traces = [];
    if (zeroed) zeroed.parts.forEach((part, index) => {
      const values = slice(zeroed, fact, index, zeroed.layers);
      if (values.some((value) => value != null)) traces.push(line(index, { name: part, x: values.map((_, layer) => layer), y: values }));
    });
    draw("zeroed", traces, {
      title: { text: "Zeroing" }, height: 310, margin: { l: 50, r: 15, t: 66, b: 44 }, showlegend: true,
      yaxis: { range: [-0.03, 1.05], title: { text: "share of p(target) lost" } }, xaxis: { title: { text: "centre layer" } },
    });
  }

  const editValue = (fact, group, layer, score) => {
    const { edits } = data;
    return numbers[edits.at + ((fact.index * edits.groups.length + group) * edits.layers.length + layer) * edits.scores.length + score];
  };

  function drawEdits(fact) {
    const { edits } = data, traces = [];
    if (edits) {
      const score = edits.scores.indexOf(at("edit-score").value);
      edits.groups.forEach((group, index) => {
        if (group.problem !== at("edit-problem").value) return;
        const values = edits.layers.map((_, layer) => editValue(fact, index, layer, score));
        if (values.every(Number.isNaN)) return;
        const reasons = edits.layers.map((layer) => edits.suspect[`${fact.index}/${index}/${layer}`]);
        const trace = line(traces.length, { name: group.name, x: edits.layers, y: values.map((value) => Number.isNaN(value) ? null : value) });
        trace.text = reasons.map((reason) => reason ? `suspect: ${plain(reason)}` : "");
        trace.marker.symbol = reasons.map((reason) => reason ? "asterisk-open" : trace.marker.symbol);
        traces.push(trace);
      });
    }
    draw("edits", traces, {
      title: { text: "This fact's edits" }, margin: { l: 50, r: 15, t: 60, b: 44 }, showlegend: true,
      yaxis: { range: [-0.03, 1.05], title: { text: "score" } }, xaxis: { title: { text: "edited layer" } },
    });
  }

  function suspectText() {
    const reasons = Object.values(data.edits?.suspect ?? {});
    const counted = unique(reasons).map((reason) => `${reasons.filter((other) => other === reason).length} because ${reason}`);
    return counted.length ? `Suspect edits, which count all the same (stars in the explorer): ${counted.join("; ")}.` : "";
  }

  function fill(id, rows) {
    at(id + "-box").hidden = rows.length === 0;
    at(id).tBodies[0].replaceChildren(...rows.map((values) => {
      const row = document.createElement("tr");
      values.forEach((value) => {
        const cell = row.insertCell();
        if (typeof value === "number") cell.className = "number";
        cell.textContent = typeof value === "number" && !Number.isInteger(value) ? number(value) : value ?? "–";
      });
      return row;
    }));
  }

  function drawGroups() {
    fill("groups", data.groups.filter((row) => row.problem === at("scores-problem").value).map((row) =>
      [row.name, row.layer, row.group, row.metric.replace("_", " "), row.pre, row.post]));
  }

  function drawTexts(fact) {
    fill("texts", (data.texts[fact.index] ?? []).filter((row) => row.problem === at("edit-problem").value).map((row) =>
      [`${row.name}, layer ${row.layer}: ${row.prompt_kind}`, row.prompt, row.before, row.after]));
  }

  // --- all facts ---

  const columns = tableColumns();
  let sorted = { column: null, down: false };

  function tableColumns() {
    const columns = [
      { name: "fact", of: (fact) => fact.id }, { name: "subject", of: (fact) => fact.subject },
      { name: "prompt", of: (fact) => fact.prompt }, { name: "target", of: (fact) => fact.true },
    ];
    const grid = (fact) => data.grids && data.grids.facts[fact.index];
    if (data.grids) columns.push(
      { name: "p clean", number: true, of: (fact) => grid(fact)?.clean }, { name: "p corrupted", number: true, of: (fact) => grid(fact)?.corrupted });
    if (data.edits) data.edits.groups.forEach((group, index) => columns.push({
      name: `${group.problem.replace(/_/g, " ")}, ${group.name}`, number: true,
      of: (fact) => {
        const values = data.edits.layers.map((_, layer) => editValue(fact, index, layer, 0)).filter((value) => !Number.isNaN(value));
        return values.length ? Math.max(...values) : null;
      },
    }));
    return columns;
  }

  function tableRows() {
    const query = at("filter").value.trim().toLowerCase();
    const rows = facts.filter((fact) => fact.key.includes(query)).map((fact) => columns.map((column) => column.of(fact)));
    if (sorted.column != null) rows.sort((one, other) => {
      const [a, b] = [one[sorted.column], other[sorted.column]];
      if (a == null || b == null) return (a == null) - (b == null);
      const order = columns[sorted.column].number ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
      return sorted.down ? -order : order;
    });
    return rows;
  }

  function drawTable() {
    const rows = tableRows(), head = document.createElement("tr");
    columns.forEach((column, index) => {
      const cell = document.createElement("th"), button = document.createElement("button");
      button.type = "button";
      button.textContent = column.name + (sorted.column === index ? (sorted.down ? " ▼" : " ▲") : "");
      button.onclick = () => { sorted = { column: index, down: sorted.column === index && !sorted.down }; drawTable(); };
      cell.setAttribute("aria-sort", sorted.column === index ? (sorted.down ? "descending" : "ascending") : "none");
      if (column.number) cell.className = "number";
      cell.append(button);
      head.append(cell);
    });
    at("table").tHead.replaceChildren(head);
    at("table").tBodies[0].replaceChildren(...rows.slice(0, MOST_ROWS).map((row) => {
      const line = document.createElement("tr");
      row.forEach((value, index) => {
        const cell = line.insertCell();
        if (columns[index].number) cell.className = "number";
        cell.textContent = columns[index].number ? number(value) : value ?? "";
      });
      return line;
    }));
    at("rows").textContent = `${rows.length} facts` + (rows.length > MOST_ROWS ? `, the first ${MOST_ROWS} are shown` : "") +
      (data.edits ? "; per problem and method the best rewrite score over layers" : "");
  }

  function csv() {
    // a leading sign would make a formula of a text in spreadsheets
    const cell = (value) => {
      const text = value == null ? "" : typeof value === "number" ? String(value) : /^[=+\-@\t\r]/.test(value) ? "'" + value : String(value);
      return /[",\n\r]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
    };
    return [columns.map((column) => column.name), ...tableRows()].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
  }

  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.download = "facts.csv";
    link.click();
    URL.revokeObjectURL(link.href);
  }

  // --- all of it ---

  at("about").textContent = `${data.title} — sweep ${data.status}, ${facts.length} facts`;
  at("answer").textContent = data.answer;
  at("header").textContent = data.header ? "Computed with " + data.header + "." : "";
  at("suspect").textContent = suspectText();
  at("missing-box").hidden = data.missing.length === 0;
  at("missing").replaceChildren(...data.missing.map((text) => { const item = document.createElement("li"); item.textContent = text; return item; }));
  options("r2-score", unique(data.r2.map((row) => row.score))).onchange = drawR2;
  options("scores-problem", unique(data.scores.map((row) => row.problem))).onchange = () => { drawScores(); drawGroups(); };
  options("scores-score", unique(data.scores.map((row) => row.score))).onchange = drawScores;
  options("edit-problem", data.edits ? unique(data.edits.groups.map((group) => group.problem)) : []).onchange = () => { drawEdits(current); drawTexts(current); };
  options("edit-score", data.edits ? data.edits.scores : []).onchange = () => drawEdits(current);
  at("search").oninput = search;
  at("facts").onchange = () => { current = facts[Number(at("facts").value)]; drawFact(); };
  at("filter").oninput = drawTable;
  at("download").onclick = download;

  function drawAll() {
    drawR2();
    drawScores();
    drawWindows();
    search();
  }
  at("theme").onclick = () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const scheme = document.documentElement.style.colorScheme || (dark ? "dark" : "light");
    document.documentElement.style.colorScheme = scheme === "dark" ? "light" : "dark";
    drawAll();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();
  drawGroups();
  drawTable();
  document.body.dataset.ready = "yes";
})();
