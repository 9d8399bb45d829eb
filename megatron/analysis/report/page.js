"use strict";
// Decodes the data of the page and draws its charts. `page.adapt(change)` registers a function
// (specification, chart id) that changes a specification before it is drawn;
// `page.views[id]` is the Vega view of a chart that is on the page.
const page = (() => {
  const source = JSON.parse(document.getElementById("page-data").textContent);
  const views = {};
  const results = {};
  const turns = {};
  const drawings = {};
  const changes = [];
  const selections = {};
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  function* columnRows(block) {
    const columns = { ...source.shared[block.shared], ...block.columns };
    const names = Object.keys(columns);
    const length = names.length ? columns[names[0]].length : 0;
    for (let i = 0; i < length; i++) {
      const row = { ...block.constants };
      for (const name of names) row[name] = columns[name][i];
      yield row;
    }
  }

  function* gridRows(block) {
    const along = Object.keys(block.along);
    const down = Object.keys(block.down);
    const cells = Object.keys(block.cells);
    const width = block.along[along[0]].length;
    const height = block.down[down[0]].length;
    for (let x = 0; x < width; x++) {
      for (let y = 0; y < height; y++) {
        const row = { ...block.constants };
        for (const name of along) row[name] = block.along[name][x];
        for (const name of down) row[name] = block.down[name][y];
        for (const name of cells) row[name] = block.cells[name][x * height + y];
        yield row;
      }
    }
  }

  // Rows of a data set, of the blocks whose constants have the selected values only.
  function rows(name, selected = {}) {
    const decoded = [];
    for (const block of source.datasets[name] || []) {
      const constants = block.constants || {};
      const wanted = Object.entries(selected).every(([key, value]) => String(constants[key]) === value);
      if (wanted) for (const row of block.along ? gridRows(block) : columnRows(block)) decoded.push(row);
    }
    return decoded;
  }

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  }

  function theme() {
    const ink = colour("ink");
    const muted = colour("muted");
    const line = colour("line");
    const series = [0, 1, 2, 3, 4, 5, 6].map((i) => colour(`series-${i}`));
    return {
      background: "transparent",
      font: "system-ui, sans-serif",
      view: { stroke: null },
      axis: {
        labelColor: muted, titleColor: muted, titleFontWeight: "normal", titleFontSize: 12,
        labelFontSize: 11, gridColor: line, domainColor: line, tickColor: line, titlePadding: 8,
      },
      legend: { labelColor: muted, titleColor: muted, titleFontWeight: "normal" },
      title: { color: ink },
      text: { color: ink },
      rule: { color: muted },
      bar: { color: series[0] },
      line: { color: series[0] },
      point: { color: series[0] },
      range: {
        category: series,
        diverging: [colour("low"), colour("neutral"), colour("high")],
        heatmap: [colour("neutral"), colour("sequence")],
        ramp: [colour("neutral"), colour("sequence")],
      },
    };
  }

  function dataNames(spec, found = new Set()) {
    if (spec && typeof spec === "object") {
      if (spec.data && spec.data.name) found.add(spec.data.name);
      for (const part of [...(spec.layer || []), ...(spec.hconcat || []), ...(spec.vconcat || [])]) {
        dataNames(part, found);
      }
      if (spec.spec) dataNames(spec.spec, found);
    }
    return found;
  }

  function specification(id) {
    const spec = structuredClone(source.charts[id]);
    for (const change of changes) change(spec, id);
    spec.datasets = {};
    for (const name of dataNames(spec)) spec.datasets[name] = rows(name, selections[id]);
    return spec;
  }

  async function drawNow(id) {
    const element = document.getElementById(id);
    try {
      const result = await vegaEmbed(element, specification(id), {
        actions: false,
        config: theme(),
        renderer: "canvas",
        tooltip: { theme: dark.matches ? "dark" : "light" },
      });
      if (results[id]) results[id].finalize();
      results[id] = result;
      views[id] = result.view;
    } catch (error) {
      element.innerHTML = '<p class="failed">This chart cannot be drawn.</p>';
      console.error(`chart ${id}: ${error.message}`);
    }
  }

  // Drawings of one chart follow each other, because two of them would share its element; one
  // that a later one replaces before it begins is left out.
  function draw(id) {
    const turn = (turns[id] = (turns[id] || 0) + 1);
    const previous = drawings[id] || Promise.resolve();
    drawings[id] = previous.then(() => (turn === turns[id] ? drawNow(id) : undefined));
    return drawings[id];
  }

  // One chart after another, in their order on the page. The browser shows what is there, and reacts
  // to the reader, between two of them.
  async function drawAll(ids = Object.keys(source.charts)) {
    const turn = (turns[""] = (turns[""] || 0) + 1);
    document.documentElement.dataset.drawn = "no";
    for (const id of ids) {
      await new Promise((resolve) => setTimeout(resolve));
      await draw(id);
    }
    if (turn === turns[""]) document.documentElement.dataset.drawn = "yes";
  }

  // Show only blocks with these constants in a chart, such as {layer: "2"}.
  function select(id, constants) {
    selections[id] = { ...selections[id], ...constants };
  }

  // Paper is white. The browser does not wait for new drawings before it prints, so page.css
  // inverts the lightness of charts that were drawn for a dark screen.
  let isPrinting = false;
  addEventListener("beforeprint", () => {
    isPrinting = true;
    if (dark.matches) document.documentElement.dataset.theme = "light";
  });
  addEventListener("afterprint", () => {
    isPrinting = false;
    delete document.documentElement.dataset.theme;
  });

  dark.addEventListener("change", () => {
    if (!isPrinting) drawAll();
  });
  return {
    adapt: (change) => changes.push(change), colour, draw, drawAll, rows, select, views,
    selected: (id) => selections[id] || {},
    charts: source.charts, datasets: source.datasets, settings: source.settings,
  };
})();
