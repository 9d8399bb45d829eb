"use strict";
// Controls of a report: x axis, smoothing, shown groups, held-out set, run and layer of heat maps.
// Charts say in `usermeta` which of them they follow (megatron/analysis/report/charts.py).
(() => {
  const settings = page.settings;
  const element = (id) => document.getElementById(id);
  const chartsWith = (key) =>
    Object.keys(page.charts).filter((id) => (page.charts[id].usermeta || {})[key]);
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

  // The rows themselves are filtered, so that axes fit what is shown.
  function hide(spec) {
    spec.params = [...(spec.params || []), { name: "hidden", value: hiddenGroups() }];
    spec.transform = [{ filter: "indexof(hidden, datum.group) < 0" }, ...(spec.transform || [])];
  }

  function fitRows(spec, count) {
    spec.height = Math.min(Math.max(14 * count, 120), 460);
    const axis = (spec.encoding.y.axis = { ...spec.encoding.y.axis });
    delete axis.values;
    if (count > 40) {
      const step = Math.ceil(count / 16);
      const domain = page.rows(spec.data.name, selectedBlock(spec.data.name));
      const names = [...new Set(domain.map((row) => row[spec.encoding.y.field]))];
      axis.values = names.filter((name) => name % step === 0);
    }
  }

  function selectedBlock(name) {
    if (name === "load") return { run: element("load-run").value, layer: element("load-layer").value };
    return { run: element("histogram-run").value };
  }

  page.adapt((spec, id) => {
    const meta = spec.usermeta || {};
    if (meta.progress) followProgress(spec);
    if (meta.smooth) smooth(spec);
    if (meta.groups) hide(spec);
    if (id === "load") {
      const { run, layer } = selectedBlock("load");
      fitRows(spec, settings.experts[run][layer]);
    }
    if (id === "histogram-map") fitRows(spec, settings.counts[element("histogram-run").value]);
  });

  function selectHeldOut() {
    const kind = element("held-out").value;
    const ids = ["held-out-loss", "final-loss"].filter((id) => page.charts[id]);
    for (const id of ids) page.select(id, { kind });
    return ids;
  }

  function listLayers() {
    const previous = element("load-layer").value;
    const layers = Object.keys(settings.experts[element("load-run").value]);
    element("load-layer").replaceChildren(...layers.map((layer) => new Option(layer, layer)));
    if (layers.includes(previous)) element("load-layer").value = previous;
  }

  function selectLoad() {
    page.select("load", selectedBlock("load"));
    return ["load"];
  }

  function selectHistogram() {
    page.select("histogram-map", selectedBlock("histogram-map"));
    return ["histogram-map"];
  }

  function showGroups() {
    const hidden = hiddenGroups();
    for (const id of chartsWith("groups")) {
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
