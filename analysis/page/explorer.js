// The explorer of single facts.

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
  at("found").textContent = `${matches.length} of ${count(facts.length, "fact")}` + (matches.length > 500 ? ", the first 500 are listed" : "");
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
  at("likeliest").replaceChildren(...["Likeliest next tokens, unedited:", ...(fact.likeliest ?? []).map(({ token, p }) =>
    `${shown(token)} ${p < 0.001 ? p.toExponential(0) : number(p)}`)].map((part, index) => {
    const item = document.createElement("span");
    item.textContent = part;
    item.className = index ? "" : "note";
    return item;
  }));
  at("likeliest").hidden = !fact.likeliest?.length;
  at("maps-note").textContent = data.grids?.facts[fact.index] ?
    `One fact, so without intervals; p(target) is the mean over ${data.samples ? count(data.samples, "draw") : "draws"} of noise.` : "";
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
  }, "One fact, so without intervals.");
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
  }, "One fact and no noise, so without intervals.");
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
    yaxis: { range: [-0.03, 1.05], title: { text: "score" } }, xaxis: { title: { text: "edited layer" }, ...ticks(editLayers) },
  }, "One edit of one fact each, so without intervals.");
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
