// The page's script is base.js, study.js, explorer.js and table.js, one after the other, as one module.

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
const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const range = (values, word) => { // "6 facts", "4 to 6 facts"
  const known = values.flat().filter((value) => value != null), low = Math.min(...known), high = Math.max(...known);
  return known.length ? (low === high ? "" : `${low} to `) + count(high, word) : "";
};
const bars = (errors) => ({ type: "data", array: errors.map((error) => 1.96 * (error ?? 0)), thickness: 1 });
const overFacts = (rows) => rows.some((row) => row.standard_error.some((error) => error != null)) ?
  "bars: 95 % intervals (1.96 standard errors over facts)" : "no intervals, as there is one fact";
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

// note: below the chart, how many facts or edits it is of, and how sure that is
function draw(id, traces, more, note) {
  const element = typeof id === "string" ? at(id) : id;
  element.hidden = traces.length === 0;
  if (traces.length) Plotly.react(element, traces, layout(more), CONFIG);
  if (note != null) element.nextElementSibling.textContent = traces.length ? note : "";
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
