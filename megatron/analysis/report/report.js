"use strict";
// Controls of a report: x axis, smoothing, shown groups, held-out set, run and layer of heat maps.
// Charts say in `usermeta` which of them they follow (megatron/analysis/report/charts.py).
(() => {
  const settings = page.settings;
  const element = (id) => document.getElementById(id);
  const chartsWith = (key) =>
    Object.keys(page.charts).filter((id) => (page.charts[id].usermeta || {})[key]);
  const expertMaps = ["load", "gate-mass"].filter((id) => page.charts[id]);
  const boxes = [...document.querySelectorAll("[data-group]")];
  const hiddenGroups = () => boxes.filter((box) => !box.checked).map((box) => box.dataset.group);

  function followProgress(spec) {
    const column = element("axis").value;
    for (const layer of spec.layer || [spec]) {
      layer.encoding.x.field = column;
      layer.encoding.x.title = settings.positions[column];
    }
    spec.transform = [{ filter: `isValid(datum['${column}'])` }, ...(spec.transform || [])];
  }

  // Running means over the points of a group; a point without a value stays a gap.
  function smooth(spec) {
    const reach = Number(element("smoothing").value);
    if (!reach) return;
    const columns = spec.usermeta.smooth;
    spec.transform = [
      ...(spec.transform || []),
      {
        window: columns.map((field) => ({ op: "mean", field, as: `running_${field}` })),
        frame: [-reach, reach],
        groupby: ["group"],
        sort: [{ field: "iteration" }],
      },
      ...columns.map((field) => ({
        calculate: `isValid(datum.${field}) ? datum.running_${field} : null`,
        as: field,
      })),
    ];
  }

  // Bounds of the y axis: one spike, or the first steps, would otherwise flatten all curves.
  function fitValues(spec, id) {
    const range = element("range").value;
    // The highest values of other metrics may be those at the end.
    if (range === "all" || (range === "low" && !id.endsWith("-loss"))) return;
    const hidden = hiddenGroups();
    const values = page
      .rows(spec.data.name, page.selected(id))
      .filter((row) => row.mean !== null && !hidden.includes(row.group))
      .map((row) => row.mean)
      .sort((a, b) => a - b);
    if (!values.length) return;
    const scale =
      range === "log"
        ? { type: "log", nice: false }
        : { zero: false, nice: true, domain: [values[0], values[Math.floor(0.8 * (values.length - 1))]] };
    const isFlat = range === "low" && scale.domain[0] === scale.domain[1];
    if (isFlat || (range === "log" && values[0] <= 0)) return;
    for (const layer of spec.layer) {
      layer.encoding.y.scale = scale;
      layer.mark.clip = true;
      // A logarithmic axis has no room for bands that reach 0.
      if (range === "log" && layer.encoding.y2) layer.transform = [{ filter: "false" }];
    }
  }

  // One scale for all charts, which does not follow what is shown, so that groups keep their looks.
  function scaleGroups(spec) {
    for (const { encoding } of spec.layer || [spec]) {
      encoding.color.scale = { domain: settings.groups };
      if (encoding.strokeDash) {
        encoding.strokeDash.scale = { domain: settings.groups, range: settings.dashes };
      }
    }
  }

  // The rows themselves are filtered, so that axes fit what is shown.
  function hide(spec) {
    spec.params = [...(spec.params || []), { name: "hidden", value: hiddenGroups() }];
    spec.transform = [{ filter: "indexof(hidden, datum.group) < 0" }, ...(spec.transform || [])];
  }

  // Height and labels of a heat map: its rows are those of the block that is shown.
  function fitRows(spec) {
    const block = blocksOf(spec.data.name, selectedBlock(spec.data.name))[0];
    if (!block) return;
    const names = block.down[spec.encoding.y.field];
    spec.height = Math.min(Math.max(14 * names.length, 120), 460);
    if (names.length > 40) {
      const step = Math.ceil(names.length / 16);
      spec.encoding.y.axis = { values: names.filter((_, row) => row % step === 0) };
    }
  }

  function blocksOf(name, constants) {
    return page.datasets[name].filter((block) =>
      Object.entries(constants).every(([key, value]) => block.constants[key] === value));
  }

  function selectedBlock(name) {
    if (expertMaps.includes(name)) return { run: element("load-run").value, layer: element("load-layer").value };
    return { run: element("histogram-run").value };
  }

  page.adapt((spec, id) => {
    const meta = spec.usermeta || {};
    if (meta.progress) {
      followProgress(spec);
      fitValues(spec, id);
    }
    if (meta.smooth) smooth(spec);
    if (meta.groups) {
      scaleGroups(spec);
      hide(spec);
    }
    if (expertMaps.includes(id) || id === "histogram-map") fitRows(spec);
  });

  function selectHeldOut() {
    const kind = element("held-out").value;
    const ids = ["held-out-loss", "final-loss"].filter((id) => page.charts[id]);
    for (const id of ids) page.select(id, { kind });
    return ids;
  }

  function listLayers() {
    const previous = element("load-layer").value;
    const blocks = blocksOf("load", { run: element("load-run").value });
    const layers = blocks.map((block) => block.constants.layer);
    element("load-layer").replaceChildren(...layers.map((layer) => new Option(layer, layer)));
    if (layers.includes(previous)) element("load-layer").value = previous;
  }

  function selectLoad() {
    for (const id of expertMaps) page.select(id, selectedBlock(id));
    return expertMaps;
  }

  function selectHistogram() {
    page.select("histogram-map", selectedBlock("histogram-map"));
    return ["histogram-map"];
  }

  function showGroups() {
    const hidden = hiddenGroups();
    const isFitted = element("range").value !== "all";
    if (isFitted) page.drawAll(chartsWith("progress"));
    for (const id of chartsWith("groups")) {
      if (isFitted && page.charts[id].usermeta.progress) continue;
      if (page.views[id]) page.views[id].signal("hidden", hidden).runAsync();
    }
  }

  async function copy(button) {
    const text = element(button.dataset.copies).textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch (error) {
      // Without permission: select the text, so that the reader's own shortcut copies it.
      getSelection().selectAllChildren(element(button.dataset.copies));
      button.textContent = "Selected: press Ctrl+C";
    }
    setTimeout(() => (button.textContent = "Copy"), 3000);
  }

  function on(id, change) {
    const control = element(id);
    if (control) control.addEventListener("change", change);
    return control;
  }

  on("axis", () => page.drawAll(chartsWith("progress")));
  on("range", () => page.drawAll(chartsWith("progress")));
  on("smoothing", () => page.drawAll(chartsWith("progress")));
  if (on("held-out", () => page.drawAll(selectHeldOut()))) selectHeldOut();
  on("load-layer", () => page.drawAll(selectLoad()));
  const loadRun = on("load-run", () => {
    listLayers();
    page.drawAll(selectLoad());
  });
  if (loadRun) {
    listLayers();
    selectLoad();
  }
  if (on("histogram-run", () => page.drawAll(selectHistogram()))) selectHistogram();
  for (const box of boxes) box.addEventListener("change", showGroups);
  const setAll = (checked) => () => {
    for (const box of boxes) box.checked = checked;
    showGroups();
  };
  if (element("show-all")) element("show-all").addEventListener("click", setAll(true));
  if (element("hide-all")) element("hide-all").addEventListener("click", setAll(false));
  for (const button of document.querySelectorAll("button.copy")) {
    button.addEventListener("click", () => copy(button));
  }
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
