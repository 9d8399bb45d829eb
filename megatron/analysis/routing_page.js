"use strict";
(() => {
const page = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const layers = page.layers;
const numTokens = page.tokens.texts.length;
const state = { layer: 0, expert: null, colour: null, pinned: null, shown: null };

/* Decoding: arrays are little-endian in base64, weights are bfloat16. */

function bytesOf(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

function integers(text, size) {
  const bytes = bytesOf(text);
  const view = new DataView(bytes.buffer);
  const read = { 1: view.getUint8, 2: view.getUint16, 4: view.getUint32 }[size].bind(view);
  return Array.from({ length: bytes.length / size }, (_, i) => read(i * size, true));
}

function weightsOf(text) {
  if (text === null) return null;
  const halves = integers(text, 2);
  const floats = new Float32Array(Uint32Array.from(halves, (half) => half * 65536).buffer);
  return floats;
}

for (const layer of layers) {
  const encoded = layer.assignments;
  const counts = integers(encoded.counts, encoded.count_bytes);
  layer.offsets = [0];
  for (const count of counts) layer.offsets.push(layer.offsets.at(-1) + count);
  layer.chosen = integers(encoded.experts, encoded.expert_bytes);
  layer.weights = weightsOf(encoded.weights);
}

function choicesOf(layer, token) {
  const found = [];
  for (let i = layer.offsets[token]; i < layer.offsets[token + 1]; i++) {
    found.push({ expert: layer.chosen[i], weight: layer.weights && layer.weights[i] });
  }
  return found.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight) || a.expert - b.expert);
}

function expertName(layer, expert) {
  if (expert < layer.num_experts) return String(expert);
  return `zero-computation ${expert - layer.num_experts}`;
}

/* Elements are made with textContent only: nothing of the text is read as HTML. */

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function option(value, text) {
  const made = element("option", text);
  made.value = value;
  return made;
}

/* A token on its own, where blanks and line breaks could not be seen. */
const compact = (text) => text.replace(/[\n\t]/g, "").replaceAll(" ", "\u2423");
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const digits = (value) => Number(value.toPrecision(3)).toString();
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

/* Header */

const distinct = (values) => [...new Set(values)];
const gates = distinct(layers.map((layer) => layer.gate)).join(", ");
const sizes = distinct(layers.map((layer) => plural(layer.num_experts, "routed expert")
  + (layer.num_zero_computation
    ? ` and ${plural(layer.num_zero_computation, "zero-computation expert")} (numbers from ${layer.num_experts})`
    : "")));
find("summary").textContent =
  `${plural(layers.length, "MoE layer")}, gate ${gates}, ${sizes.join("; ")}.`;
for (const note of page.notes) find("notes").append(element("li", note));

/* Tokens */

const spans = [];
const starts = new Set(page.tokens.documents);
page.tokens.texts.forEach((text, token) => {
  if (token && starts.has(token)) find("tokens").append(element("hr", undefined, "document"));
  const span = element("span", text, "token");
  span.dataset.token = token;
  span.tabIndex = token ? -1 : 0;
  if (page.classes[page.tokens.classes[token]] === page.classes.at(-1)) span.classList.add("silent");
  spans.push(span);
  find("tokens").append(span);
});

function showDetail(token) {
  if (state.shown !== null) spans[state.shown].classList.remove("current");
  state.shown = token;
  spans[token].classList.add("current");
  const heading = element("h3");
  heading.append(element("span", compact(page.tokens.texts[token]), "text"));
  const facts = [`token ${token}`];
  if (page.tokens.ids) facts.push(`id ${page.tokens.ids[token]}`);
  facts.push(page.classes[page.tokens.classes[token]]);
  facts.push(plural(page.tokens.experts[token], "expert"));
  if (page.tokens.routed) facts.push(`${page.tokens.routed[token]} of them routed`);
  if (page.tokens.entropy) facts.push(`weight entropy ${digits(page.tokens.entropy[token])}`);
  const table = element("table");
  const head = table.createTHead().insertRow();
  head.append(element("th", "layer"), element("th", layers[0].weights ? "experts and weights" : "experts"));
  const body = table.createTBody();
  layers.forEach((layer, number) => {
    const row = body.insertRow();
    row.append(element("td", String(number)));
    const cell = row.insertCell();
    const chosen = choicesOf(layer, token);
    if (!chosen.length) cell.append(element("span", "none", "hint"));
    for (const { expert, weight } of chosen) {
      const item = element("span", undefined, "chosen");
      item.append(element("b", expertName(layer, expert)));
      if (weight !== null) item.append(` ${digits(weight)}`);
      cell.append(item, " ");
    }
  });
  const close = element("button", "\u00d7", "close");
  close.setAttribute("aria-label", "Close");
  close.addEventListener("click", hideDetail);
  document.body.classList.add("open");
  find("detail").replaceChildren(close, heading, element("p", facts.join(" · ")), table);
}

const hint = find("detail").firstElementChild;

function hideDetail() {
  pin(null);
  if (state.shown !== null) spans[state.shown].classList.remove("current");
  state.shown = null;
  document.body.classList.remove("open");
  find("detail").replaceChildren(hint);
}

function pin(token) {
  if (state.pinned !== null) spans[state.pinned].classList.remove("pinned");
  state.pinned = token;
  if (token === null) return;
  for (const span of spans) if (span.tabIndex === 0) span.tabIndex = -1;
  spans[token].tabIndex = 0;
  spans[token].classList.add("pinned");
  showDetail(token);
}

function tokenOf(event) {
  const span = event.target.closest(".token");
  return span ? Number(span.dataset.token) : null;
}

find("tokens").addEventListener("pointerover", (event) => {
  const token = tokenOf(event);
  if (token !== null && state.pinned === null && event.pointerType !== "touch") showDetail(token);
});
find("tokens").addEventListener("click", (event) => {
  const token = tokenOf(event);
  if (token === null) return;
  pin(token === state.pinned ? null : token);
  spans[token].focus({ preventScroll: true });
});
find("tokens").addEventListener("keydown", (event) => {
  const token = tokenOf(event);
  if (token === null) return;
  const targets = {
    ArrowRight: token + 1,
    ArrowDown: token + 10,
    ArrowLeft: token - 1,
    ArrowUp: token - 10,
    Home: 0,
    End: numTokens - 1,
    Enter: token,
    " ": token,
  };
  if (event.key === "Escape") {
    hideDetail();
  } else if (event.key in targets) {
    event.preventDefault();
    const next = Math.min(numTokens - 1, Math.max(0, targets[event.key]));
    pin(next);
    spans[next].focus();
  }
});
find("tokens").addEventListener("focusin", (event) => {
  const token = tokenOf(event);
  if (token !== null && state.pinned === null && event.target.matches(":focus-visible")) showDetail(token);
});

/* Colours */

const colours = {
  experts: {
    label: "number of experts",
    meaning: "experts of the token, summed over layers",
    values: () => page.tokens.experts,
  },
  routed: {
    label: "number of routed experts",
    meaning: "experts of the token without zero-computation experts, summed over layers",
    values: () => page.tokens.routed,
  },
  entropy: {
    label: "entropy of the weights",
    meaning: "entropy of the weights of the token's experts in nats, mean over layers",
    values: () => page.tokens.entropy,
  },
  expert: {
    label: "the selected expert",
    meaning: "share of the selected expert in the token's weights in this layer",
    values: () => Array.from({ length: numTokens }, (_, token) => shareOf(token)),
  },
};

function shareOf(token) {
  let all = 0;
  let own = 0;
  for (const { expert, weight } of choicesOf(layers[state.layer], token)) {
    const size = weight === null ? 1 : Math.abs(weight);
    all += size;
    if (expert === state.expert) own += size;
  }
  return all ? own / all : 0;
}

function paint() {
  const colour = colours[state.colour];
  const values = colour.values();
  // Not Math.min(...values): a call has fewer arguments than a page may have tokens.
  let low = values.reduce((least, value) => Math.min(least, value));
  const high = values.reduce((most, value) => Math.max(most, value));
  if (state.colour === "expert") low = 0;
  const range = high - low;
  values.forEach((value, token) => {
    spans[token].style.setProperty("--heat", range ? ((value - low) / range).toFixed(3) : "0");
  });
  find("low").textContent = digits(low);
  find("high").textContent = digits(high);
  find("meaning").textContent = colour.meaning;
}

function isConstant(values) {
  return values.every((value) => value === values[0]);
}

for (const [name, colour] of Object.entries(colours)) {
  if (name !== "expert" && !page.tokens[name]) continue;
  find("colour").append(option(name, colour.label));
}
const telling = ["experts", "routed", "entropy"].find(
  (name) => page.tokens[name] && !isConstant(page.tokens[name]));
state.colour = telling || "expert";
find("colour").value = state.colour;
find("colour").addEventListener("change", (event) => {
  state.colour = event.target.value;
  paint();
});

/* Selection of a layer and an expert */

layers.forEach((layer, number) => {
  find("layer").append(option(number, `${number} (${layer.gate})`));
});

/* An expert without tokens is kept only if it was chosen in this layer. */
function selectLayer(number, expert, isChosen = false) {
  state.layer = number;
  find("layer").value = number;
  const listed = layers[number].listed;
  find("expert").replaceChildren();
  for (const use of listed) {
    const text = `${expertName(layers[number], use.expert)} (${plural(use.count, "token")})`;
    find("expert").append(option(use.expert, text));
  }
  const known = listed.some((use) => use.expert === expert && (use.count || isChosen));
  if (!known && listed.length) {
    expert = listed.reduce((most, use) => (use.count > most.count ? use : most)).expert;
  }
  selectExpert(listed.length ? expert : null);
  return fillMatrix();
}

function selectExpert(expert) {
  state.expert = expert;
  if (expert !== null) find("expert").value = expert;
  showUse();
  if (state.colour === "expert") paint();
}

find("layer").addEventListener("change", (event) => selectLayer(Number(event.target.value), state.expert));
find("expert").addEventListener("change", (event) => selectExpert(Number(event.target.value)));

function row(body, text, className, ...numbers) {
  const made = body.insertRow();
  made.insertCell().append(element("span", text, className));
  for (const number of numbers) made.append(element("td", number, "number"));
}

function showUse() {
  const layer = layers[state.layer];
  const use = layer.listed.find((listed) => listed.expert === state.expert);
  find("top").replaceChildren();
  find("by-class").replaceChildren();
  if (!use || !use.count) {
    find("use").textContent = "No token uses it in this layer.";
    if (use) find("use").textContent = `No token uses expert ${expertName(layer, use.expert)} of layer ${state.layer}.`;
    return;
  }
  find("use").textContent =
    `Expert ${expertName(layer, use.expert)} of MoE layer ${state.layer}: ${plural(use.count, "token")}.`;
  for (const [key, count, lift] of use.tokens) {
    row(find("top"), compact(page.vocabulary[key]), "text", String(count), digits(lift));
  }
  if (!use.tokens.length) row(find("top"), "none is more frequent than in the layer", "hint", "", "");
  use.classes.forEach((count, number) => {
    if (!count && !use.class_lifts[number]) return;
    row(find("by-class"), page.classes[number], "", percent(count / use.count), digits(use.class_lifts[number]));
  });
}

/* Charts */

const views = {};

function themed() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const labels = { labelColor: colour("--muted"), titleColor: colour("--text") };
  return {
    background: "transparent",
    view: { stroke: "transparent" },
    bar: { color: colour("--hot") },
    axis: { ...labels, gridColor: colour("--line"), domainColor: colour("--line"), tickColor: colour("--line") },
    legend: labels,
    font: "system-ui, sans-serif",
  };
}

/* One after the other: two drawings of a chart at the same time would both stay in the page. */
let drawing = Promise.resolve();

function draw(name, rows) {
  drawing = drawing.then(() => embed(name, rows));
  return drawing;
}

async function embed(name, rows) {
  const spec = { ...page.charts[name], config: themed(), datasets: { [name]: rows } };
  const theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  if (views[name]) views[name].finalize();
  const result = await vegaEmbed(find(name), spec, { actions: false, renderer: "canvas", tooltip: { theme } });
  views[name] = result.view;
  return result.view;
}

function loadRows() {
  const rows = [];
  layers.forEach((layer, number) => {
    const choices = layer.num_experts + layer.num_zero_computation;
    layer.load.forEach((load, index) => {
      const first = index * layer.bin_width;
      const last = Math.min(choices, first + layer.bin_width) - 1;
      const experts = first === last ? expertName(layer, first) : `${first} to ${last}`;
      rows.push({ layer: number, bin: first, experts, load });
    });
  });
  return rows;
}

function matrixRows() {
  const layer = layers[state.layer];
  const experts = layer.matrix.experts;
  const counts = integers(layer.matrix.counts, 4);
  const size = experts.length;
  const rows = [];
  for (let i = 0; i < size; i++) {
    for (let j = 0; j < size; j++) {
      const own = counts[i * size + i];
      const other = counts[j * size + j];
      const positions = counts[i * size + j];
      if (i === j || !own) continue;
      const share = positions / own;
      const lift = other ? (share * page.num_tokens) / other : 0;
      rows.push({ row: experts[i], column: experts[j], share, lift, positions });
    }
  }
  return rows;
}

async function fillMatrix() {
  const rows = matrixRows();
  const together = rows.some((entry) => entry.positions);
  find("matrix-note").textContent = together
    ? `MoE layer ${state.layer}: of the tokens that use the expert of a row, the share that also uses the expert of a column.`
    : `MoE layer ${state.layer}: no token uses two of these experts.`;
  find("co_activation").hidden = !together;
  if (!together) return;
  await draw("co_activation", rows);
}

async function drawAll() {
  const view = await draw("load", loadRows());
  view.addEventListener("click", (event, item) => {
    if (item && item.datum && "bin" in item.datum) {
      selectLayer(item.datum.layer, item.datum.bin, true);
    }
  });
  if (page.class_means) await draw("classes", page.class_means.rows);
}

find("class-section").hidden = !page.class_means;
paint();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  drawAll();
  fillMatrix();
});
Promise.all([drawAll(), selectLayer(0, null)]).then(() => document.body.classList.add("ready"));
})();
