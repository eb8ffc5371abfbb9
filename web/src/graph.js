// The graph of what is open, drawn by cytoscape.

import cytoscape from "cytoscape";
import { place } from "./layout.js";
import { shortText } from "./words.js";

const LETTER = 6.7;

export class GraphView {
  constructor(host, model, events) {
    this.host = host;
    this.model = model;
    this.events = events;
    this.filter = { axis: "", phase: "", colour: "placement" };
    this.selected = null;
    this.hottest = Math.max(...model.data.elements.map((one) => (one.s ? one.s[0] : 0)), 1e-12);
    this.view = cytoscape({
      container: host, elements: [], style: [], minZoom: 0.02, maxZoom: 3,
      boxSelectionEnabled: false, autoungrabify: true, hideEdgesOnViewport: false,
    });
    this.view.on("tap", "node", (event) => {
      const item = this.itemOf(event.target.id());
      this.events.select(item);
    });
    this.view.on("dbltap", "node", (event) => {
      const item = this.itemOf(event.target.id());
      if (typeof item !== "number") this.events.toggle(item);
    });
    new ResizeObserver(() => this.view.resize()).observe(host);
    this.view.on("mouseover", "node", () => (host.style.cursor = "pointer"));
    this.view.on("mouseout", "node", () => (host.style.cursor = ""));
  }

  itemOf(id) {
    return id[0] === "e" ? Number(id.slice(1)) : this.model.containers[Number(id.slice(1))];
  }

  idOf(item) {
    return typeof item === "number" ? `e${item}` : item.id;
  }

  label(item) {
    if (typeof item !== "number") {
      const run = item.kind === "run" ? item : this.model.standsFor(item);
      const name = run ? `${run.name} × ${run.count}` : item.name;
      if (item.open) return name;
      const sends = this.model.sends(item);
      const more = sends.length > 2 ? ", …" : "";
      return sends.length ? `${name}\n⇄ ${sends.slice(0, 2).join(", ")}${more}` : name;
    }
    const element = this.model.data.elements[item];
    if (element.k === "sync") return element.t;
    if (element.k === "input") return element.n;
    const split = (element.split || []).filter(Boolean);
    const below = split.length ? `splits ${[...new Set(split)].join(", ")}` : element.role || "";
    return below ? `${element.t}\n${shortText(below, 34)}` : element.t;
  }

  size(item) {
    const lines = this.label(item).split("\n");
    const closed = typeof item !== "number";
    const letters = Math.max(...lines.map((line) => line.length), 3);
    const extra = closed ? 2 : lines.length;
    return { width: letters * (closed ? LETTER + 0.8 : LETTER) + 22, height: 12 + 14 * extra };
  }

  // Whether the filters leave something bright.
  isBright(item) {
    if (typeof item !== "number") return true;
    const { axis, phase } = this.filter;
    const element = this.model.data.elements[item];
    if (element.k === "sync") {
      return element.moves.some(([p, a]) => (!axis || a === axis) && (!phase || p === phase));
    }
    if (phase) return phase !== "update";
    if (axis && element.k === "op") return this.letter(element) !== "I";
    return true;
  }

  letter(element) {
    const at = this.model.data.mesh.findIndex(([name]) => name === this.filter.axis);
    const letters = (element.p && element.p[0]) || "";
    if (at >= 0) return letters[at] || "I";
    return ["P", "S", "R"].find((one) => letters.includes(one)) || "I";
  }

  kind(item) {
    if (typeof item !== "number") {
      return item.kind === "run" || this.model.standsFor(item) ? "run" : "module";
    }
    const element = this.model.data.elements[item];
    if (element.k === "sync") {
      return element.moves.some(([phase]) => phase === "forward") ? "sync" : "sync back";
    }
    if (element.k === "input") return "input";
    return `op place${this.letter(element)}`;
  }

  heat(item) {
    const numbers = typeof item === "number" ? [item] : this.model.inside(item);
    const seconds = numbers.map((number) => {
      const one = this.model.data.elements[number];
      return one.s ? one.s[0] : 0;
    });
    return Math.min(1, Math.sqrt(Math.max(...seconds, 0) / this.hottest));
  }

  // Draw what is open, anew. Where something was selected, it stays where it was on the screen.
  draw(fit = false) {
    const anchor = this.selected !== null ? this.view.getElementById(this.idOf(this.selected)) : null;
    const before = anchor && anchor.nonempty() ? anchor.renderedPosition() : null;
    const { points, edges, holder, bends } = place(this.model, (item) => this.size(item));
    const elements = [];
    for (const [id, item] of holder) {
      const target = this.itemOf(id);
      const parent = item === this.model.root ? undefined : item.id;
      const node = { data: { id, parent, label: this.label(target), heat: this.heat(target) } };
      node.classes = this.kind(target);
      if (typeof target !== "number") node.classes += target.open ? " open" : " closed";
      if (!this.isBright(target)) node.classes += " dim";
      if (points.has(id)) {
        node.position = points.get(id);
        const { width, height } = this.size(target);
        Object.assign(node.data, { width, height });
      }
      elements.push(node);
    }
    for (const [source, target] of edges) {
      const [from, to] = [source, target].map((id) =>
        points.get(id) && { ...points.get(id), high: this.size(this.itemOf(id)).height });
      const bend = bent(from, to, bends.get(`${source} ${target}`));
      const data = { id: `${source} ${target}`, source, target, ...bend };
      elements.push({ data, classes: bend ? "bent" : "" });
    }
    this.view.batch(() => {
      this.view.elements().remove();
      this.view.add(elements);
    });
    this.style();
    this.mark();
    const now = this.selected !== null ? this.view.getElementById(this.idOf(this.selected)) : null;
    if (fit) this.fit();
    else if (before && now && now.nonempty()) {
      const after = now.renderedPosition();
      this.view.panBy({ x: before.x - after.x, y: before.y - after.y });
    }
  }

  // Fit the width at a size that can be read, and begin at the top.
  fit() {
    const box = this.view.elements().boundingBox();
    const wide = this.view.width(), high = this.view.height();
    if (!wide || !high || !box.w) return;
    const zoom = Math.min(wide / (box.w + 60), 1.15);
    const readable = Math.max(zoom, Math.min(0.55, high / (box.h + 60)));
    this.view.zoom(readable);
    const left = (wide - box.w * readable) / 2 - box.x1 * readable;
    this.view.pan({ x: left, y: 24 - box.y1 * readable });
  }

  whole() {
    this.view.fit(undefined, 24);
  }

  select(item, centre) {
    this.selected = item;
    this.mark();
    if (!centre || item === null) return;
    const node = this.view.getElementById(this.idOf(item));
    if (node.empty()) return;
    if (this.view.zoom() < 0.5) this.view.zoom(0.8);
    if (node.isParent()) this.view.fit(node, 40);
    else this.view.center(node);
  }

  mark() {
    this.view.nodes().removeClass("chosen");
    this.view.edges().removeClass("near");
    if (this.selected === null) return;
    const node = this.view.getElementById(this.idOf(this.selected));
    node.addClass("chosen");
    if (!node.isParent()) node.connectedEdges().addClass("near");
  }

  zoomBy(factor) {
    const middle = { x: this.view.width() / 2, y: this.view.height() / 2 };
    this.view.zoom({ level: this.view.zoom() * factor, renderedPosition: middle });
  }

  panBy(x, y) {
    this.view.panBy({ x, y });
  }

  // The colours are those of the page's dress, light or dark.
  style() {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => css.getPropertyValue(`--${name}`).trim();
    const font = "DejaVu Sans, Verdana, sans-serif";
    const placements = ["I", "R", "S", "P"].map((letter) => ({
      selector: `.place${letter}`,
      style: {
        "background-color": colour(`place-${letter}`), "border-color": colour(`edge-${letter}`),
      },
    }));
    const hot = this.filter.colour !== "time" ? [] : [{
      selector: ".op, .sync, .closed",
      style: {
        "background-color": colour("heat"), "border-color": colour("edge-heat"),
        "background-opacity": "data(heat)",
      },
    }];
    this.view.style([
      {
        selector: "node",
        style: {
          shape: "round-rectangle", label: "data(label)", "font-family": font, "font-size": 11,
          "text-wrap": "wrap", "text-max-width": 400, "line-height": 1.25, color: colour("ink"),
          "text-valign": "center", "text-halign": "center", width: 60, height: 26,
          "border-width": 1, "background-color": colour("card"), "border-color": colour("edge"),
        },
      },
      { selector: "node[width]", style: { width: "data(width)", height: "data(height)" } },
      {
        selector: ".open",
        style: {
          "text-valign": "top", "text-halign": "center", "text-margin-y": -4, "font-weight": "bold",
          padding: 16, "background-opacity": 0.5, "background-color": colour("frame"),
          "border-color": colour("edge"), color: colour("quiet"), "text-wrap": "none",
        },
      },
      { selector: ".run.open", style: { "border-style": "dashed", "border-width": 1.5 } },
      {
        selector: ".closed",
        style: { "background-color": colour("closed"), "font-weight": "bold", "border-width": 1.5 },
      },
      { selector: ".run.closed", style: { "border-style": "double", "border-width": 4 } },
      ...placements,
      {
        selector: ".sync",
        style: {
          shape: "cut-rectangle", "background-color": colour("forward"), color: colour("on-strong"),
          "border-color": colour("forward"), "font-weight": "bold",
        },
      },
      {
        selector: ".sync.back",
        style: { "background-color": colour("backward"), "border-color": colour("backward") },
      },
      {
        selector: ".input",
        style: { "background-color": colour("ground"), "border-style": "dashed" },
      },
      ...hot,
      {
        selector: "edge",
        style: {
          width: 1.4, "line-color": colour("line"), "target-arrow-color": colour("line"),
          "target-arrow-shape": "triangle", "arrow-scale": 0.8, "curve-style": "bezier",
        },
      },
      {
        selector: ".bent",
        style: {
          "curve-style": "round-segments", "segment-weights": "data(weights)",
          "segment-distances": "data(distances)", "edge-distances": "node-position",
          "segment-radii": 14,
        },
      },
      { selector: ".dim", style: { opacity: 0.25 } },
      {
        selector: ".chosen",
        style: { "border-color": colour("accent"), "border-width": 3, "border-style": "solid" },
      },
      {
        selector: ".near",
        style: {
          "line-color": colour("accent"), "target-arrow-color": colour("accent"), width: 2.4,
        },
      },
    ]);
  }

  // What the screen reader is told of the picture as a whole.
  summary() {
    const nodes = this.view.nodes().filter((node) => !node.isParent()).length;
    return `Graph with ${nodes} boxes and ${this.view.edges().length} arrows.`;
  }

}

// The way around what lies between two ends, as cytoscape says it: along and beside the straight
// line between them. Points that change nothing are left out.
function bent(from, to, points) {
  if (!from || !to || !points || to.y < from.y) return null;
  const top = from.y + from.high / 2, bottom = to.y - to.high / 2;
  const between = points.filter((one) => one.y > top + 3 && one.y < bottom - 3);
  const way = [from];
  between.forEach((one, at) => {
    const before = way[way.length - 1], after = between[at + 1] || to;
    const turn = (one.x - before.x) * (after.y - before.y) - (one.y - before.y) * (after.x - before.x);
    const length = Math.hypot(after.x - before.x, after.y - before.y) || 1;
    if (Math.abs(turn) / length > 2.5) way.push(one);
  });
  way.shift();
  if (!way.length) return null;
  const x = to.x - from.x, y = to.y - from.y, length = Math.hypot(x, y) || 1;
  return {
    weights: way.map((one) => ((one.x - from.x) * x + (one.y - from.y) * y) / length ** 2),
    distances: way.map((one) => (x * (one.y - from.y) - y * (one.x - from.x)) / length),
  };
}
