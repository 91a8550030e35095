// The table of all facts, and what happens on opening the page.

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
  at("rows").textContent = count(rows.length, "fact") + (rows.length > MOST_ROWS ? `, the first ${MOST_ROWS} are shown` : "") +
    (editLayers.length > 1 ? "; per problem and method the best rewrite score over layers" : data.edits ? "; edits by their rewrite score" : "");
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

at("about").textContent = `${data.title} — sweep ${data.status}, ${count(facts.length, "fact")}`;
const over = data.progress.filter(([, units]) => units.match(/^([\d,]+) of \1$/)).length;
at("progress-title").textContent = `This sweep is ${data.status}: ${over} of ${count(data.progress.length, "stage")} done`;
fill("progress", data.progress);
if (editLayers.length === 1) at("scores-title").textContent = `How well edits do, at layer ${editLayers[0]}`;
at("texts-title").textContent = "What models wrote, before and after the edit" + (editLayers.length > 1 ? " at each method's best layer" : "");
at("answer").textContent = data.answer;
at("header").textContent = data.header ? "Computed with " + data.header + "." : "";
at("suspect").textContent = suspectText();
at("missing-box").hidden = data.missing.length === 0;
at("missing").replaceChildren(...data.missing.map((text) => { const item = document.createElement("li"); item.textContent = text; return item; }));
options("r2-score", unique(data.r2.map((row) => row.score))).onchange = drawR2;
options("scores-problem", unique(data.scores.map((row) => row.problem))).onchange = () => { drawScores(); drawGroups(); };
options("scores-score", unique(data.scores.map((row) => row.score))).onchange = drawScores;
options("sequences-problem", unique(data.sequences.lines.map((row) => row.problem))).onchange = drawSequences;
options("sequences-metric", unique(data.sequences.lines.map((row) => row.metric))).onchange = drawSequences;
options("averages-state", unique(data.averages.map((row) => row.state)), String).onchange = drawAverages;
at("averages-box").hidden = data.averages.length === 0;
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
  drawAverages();
  drawSequences();
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
