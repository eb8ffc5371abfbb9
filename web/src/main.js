// The page of a plan: reads its data, and connects tree, graph, details, threads, timeline, memory.

import { gunzipSync, strFromU8 } from "fflate";
import { details } from "./details.js";
import { GraphView } from "./graph.js";
import { Model } from "./model.js";
import { Search } from "./search.js";
import { TimelineView } from "./timeline.js";
import { TreeView } from "./tree.js";
import { bytesText, escapeText } from "./words.js";

const byId = (id) => document.getElementById(id);

function unpacked(text) {
  const letters = atob(text.trim());
  const packed = Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
  return JSON.parse(strFromU8(gunzipSync(packed)));
}

function start() {
  const data = unpacked(byId("data").textContent);
  const model = new Model(data);
  let selected = null;
  const events = {
    select(item, centre = false) {
      selected = item;
      tree.select(item);
      graph.select(item, centre);
      tell();
    },
    toggle(item) {
      if (item === model.root) return;
      item.open = !item.open;
      redraw();
    },
    unfold(run) {
      run.unfolded = !run.unfolded;
      redraw();
    },
    find(item) {
      model.reveal(item);
      selected = item;
      graph.selected = item;
      tree.selected = item;
      show("graph");
      redraw();
      events.select(item, true);
    },
  };
  const tree = new TreeView(byId("tree"), model, events);
  const graph = new GraphView(byId("graph"), model, events);
  const timeline = new TimelineView(byId("timeline"), model, {
    select: (item) => {
      selected = item;
      graph.selected = item;
      tree.select(item);
      tell();
    },
  });
  new Search(byId("search"), byId("results"), byId("status"), model, events);

  function redraw(fit = false) {
    graph.draw(fit);
    tree.draw();
  }

  function tell() {
    byId("details-body").innerHTML = details(model, selected);
    document.body.classList.toggle("chosen", selected !== null);
  }

  // -- tabs

  const tabs = [...document.querySelectorAll('[role="tab"]')];

  function show(name) {
    for (const tab of tabs) {
      const chosen = tab.dataset.tab === name;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
      byId(`panel-${tab.dataset.tab}`).hidden = !chosen;
    }
    document.body.dataset.tab = name;
    if (name === "graph") {
      graph.view.resize();
      if (graph.selected !== null) events.select(graph.selected, true);
    }
    if (name === "timeline") timeline.draw();
  }

  tabs.forEach((tab, at) => {
    tab.addEventListener("click", () => show(tab.dataset.tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(at + step + tabs.length) % tabs.length];
      show(next.dataset.tab);
      next.focus();
      event.preventDefault();
    });
  });

  // -- filters and buttons

  byId("axis").innerHTML += data.mesh.map(([name, size]) =>
    `<option value="${escapeText(name)}">${escapeText(name)} (${size})</option>`).join("");
  for (const name of ["axis", "phase", "colour"]) {
    byId(name).addEventListener("change", (event) => {
      graph.filter[name] = event.target.value;
      timeline.phase = graph.filter.phase;
      redraw();
      timeline.draw();
    });
  }
  const dress = window.matchMedia("(prefers-color-scheme: dark)");

  function dressed() {
    const chosen = document.documentElement.dataset.theme;
    const dark = chosen ? chosen === "dark" : dress.matches;
    byId("theme").setAttribute("aria-pressed", String(dark));
    byId("theme").textContent = dark ? "Light" : "Dark";
    graph.style();
    timeline.draw();
    return dark;
  }

  dress.addEventListener("change", dressed);
  const actions = {
    theme: () => {
      document.documentElement.dataset.theme = dressed() ? "light" : "dark";
      dressed();
    },
    open: () => (model.setAll(true), redraw(true)),
    close: () => (model.setAll(false), redraw(true)),
    fit: () => graph.whole(),
    in: () => graph.zoomBy(1.3),
    out: () => graph.zoomBy(1 / 1.3),
    modules: () => byId("modules").setAttribute("aria-expanded",
      String(document.body.classList.toggle("drawer"))),
    dismiss: () => events.select(null),
  };
  for (const [name, action] of Object.entries(actions)) byId(name).addEventListener("click", action);

  // -- keys

  const element = byId("graph");
  element.addEventListener("keydown", (event) => {
    const order = tree.items.map(([item]) => item);
    const step = (by) => {
      const at = order.indexOf(selected);
      const next = order[Math.min(Math.max(at + by, 0), order.length - 1)];
      events.select(next, true);
    };
    const keys = {
      ArrowLeft: () => graph.panBy(60, 0), ArrowRight: () => graph.panBy(-60, 0),
      ArrowUp: () => graph.panBy(0, 60), ArrowDown: () => graph.panBy(0, -60),
      "+": actions.in, "=": actions.in, "-": actions.out, 0: actions.fit,
      n: () => step(1), p: () => step(-1),
      Enter: () => selected !== null && typeof selected !== "number" && events.toggle(selected),
    };
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    keys[event.key]();
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(document.activeElement.tagName);
    if (event.key === "/" && !typing) {
      byId("search").focus();
      event.preventDefault();
    } else if (event.key === "Escape" && !typing) {
      if (document.body.classList.contains("drawer")) actions.modules();
      else events.select(null);
    }
  });
  window.addEventListener("resize", () => timeline.draw());

  fillMemory(data);
  fillThreads(data);
  tell();
  show("graph");
  redraw(true);
  dressed();
  byId("summary").textContent = graph.summary();
  document.body.dataset.ready = "true";
  // What a test, or a curious reader, may ask.
  window.plan = { data, model, graph, tree, timeline, events };
}

function fillMemory(data) {
  const { rows, limit, items } = data.memory;
  const total = rows.reduce((sum, [, nbytes]) => sum + nbytes, 0);
  if (!total) {
    byId("memory-bar").innerHTML = "";
    byId("memory").innerHTML = "<p>Nobody has counted the memory of this plan.</p>";
    return;
  }
  const most = Math.max(total, limit || 0);
  const parts = rows.filter(([, nbytes]) => nbytes).map(([name, nbytes]) => {
    const share = (100 * nbytes) / most;
    return `<span class="part ${name.replace(" ", "-")}" style="width:${share}%" ` +
      `title="${name}: ${bytesText(nbytes)}"></span>`;
  }).join("");
  const words = rows.filter(([, nbytes]) => nbytes)
    .map(([name, nbytes]) => `${name} ${bytesText(nbytes)}`).join(", ");
  const allowed = limit ? ` of ${bytesText(limit)} allowed` : "";
  const told = `Memory on the rank that needs most: ${bytesText(total)}${allowed}: ${words}.`;
  const mark = limit ? `<span class="limit" style="left:${(100 * limit) / most}%"></span>` : "";
  const bar = `<div class="bar" role="img" aria-label="${told}">${parts}${mark}</div>`;
  byId("memory-bar").innerHTML = `${bar}<span class="quiet">${bytesText(total)}${allowed}</span>`;
  const legend = rows.filter(([, nbytes]) => nbytes).map(([name, nbytes]) =>
    `<li><span class="part ${name.replace(" ", "-")}"></span>${name}<b>${bytesText(nbytes)}</b></li>`);
  const table = items.length
    ? `<div class="scroll"><table><thead><tr><th scope="col">what</th><th scope="col">tensor</th>` +
      `<th scope="col">module</th><th scope="col">number</th><th scope="col">size</th></tr></thead>` +
      `<tbody>${items.map(([kind, name, where, count, nbytes]) =>
        `<tr><td>${kind}</td><td><code>${escapeText(name)}</code></td><td>${escapeText(where)}</td>` +
        `<td>${count}</td><td>${bytesText(nbytes)}</td></tr>`).join("")}</tbody></table></div>`
    : "<p>The plan was read from a text: which tensors take it is not known.</p>";
  byId("memory").innerHTML = `<p>${told}</p>${bar}<ul class="legend">${legend.join("")}</ul>${table}`;
}

function fillThreads(data) {
  const told = "The plan was read from a text, or is in parts: its threads are not drawn.";
  byId("threads").innerHTML = data.threads || `<p>${told}</p>`;
  if (data.table) {
    byId("threads").innerHTML += `<details><summary>All threads as a table</summary><pre>` +
      `${escapeText(data.table)}</pre></details>`;
  }
}

start();
