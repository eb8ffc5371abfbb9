// The predicted step on two streams: what is computed, and what is communicated meanwhile.

import { escapeText, secondsText } from "./words.js";

const ROW = 46, TOP = 26;

export class TimelineView {
  constructor(host, model, events) {
    this.model = model;
    this.events = events;
    this.data = model.data.timeline;
    this.total = Math.max(this.data.seconds * 1e9, 1);
    this.from = 0;
    this.to = this.total;
    this.phase = "";
    host.innerHTML = `<p class="quiet">${this.words()}</p><canvas tabindex="0" role="img" ` +
      `aria-label="${escapeText(this.words())}"></canvas><p class="hover quiet" aria-live="polite">` +
      "Wheel or + and − zoom, drag or arrows move, 0 shows all; click what runs to see it in the " +
      "graph.</p>";
    this.canvas = host.querySelector("canvas");
    this.hover = host.querySelector(".hover");
    this.canvas.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
    this.canvas.addEventListener("pointerdown", (event) => this.onDown(event));
    this.canvas.addEventListener("pointermove", (event) => this.onMove(event));
    this.canvas.addEventListener("pointerup", (event) => this.onUp(event));
    this.canvas.addEventListener("keydown", (event) => this.onKey(event));
    // Which element an event is of: an op by its name, a redistribution by the value behind it.
    this.byName = new Map();
    model.data.elements.forEach((element, at) => {
      if (element.k === "op") this.byName.set(element.n, at);
    });
    this.values = new Map();
    model.data.elements.forEach((element, at) => {
      if (element.k === "sync") this.values.set(element.n, at);
    });
  }

  words() {
    const { events, streams, phases, seconds } = this.data;
    const parts = streams.map((stream, at) => {
      const each = phases.map((phase, place) => {
        const sum = events.reduce((total, one) =>
          one[1] === at && one[2] === place ? total + one[4] : total, 0);
        return sum ? `${phase} ${secondsText(sum / 1e9)}` : "";
      }).filter(Boolean);
      return `${stream}: ${each.join(", ") || "nothing"}`;
    });
    return `One step takes ${secondsText(seconds)}, with what overlaps. ${parts.join("; ")}.`;
  }

  scale() {
    return (this.canvas.clientWidth - 110) / (this.to - this.from);
  }

  draw() {
    const canvas = this.canvas, ratio = window.devicePixelRatio || 1;
    const wide = canvas.clientWidth, high = TOP + ROW * this.data.streams.length + 8;
    if (!wide) return;
    canvas.style.height = `${high}px`;
    canvas.width = wide * ratio;
    canvas.height = high * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => css.getPropertyValue(`--${name}`).trim();
    pen.font = "11px DejaVu Sans, Verdana, sans-serif";
    pen.fillStyle = colour("quiet");
    this.data.streams.forEach((stream, at) => pen.fillText(stream, 4, TOP + ROW * at + 26));
    this.ticks(pen, high, colour);
    const scale = this.scale();
    const colours = { forward: colour("phase-f"), backward: colour("phase-b"),
      recompute: colour("phase-r"), update: colour("phase-u") };
    const last = this.data.streams.map(() => -1);
    for (const [name, stream, phase, start, length] of this.data.events) {
      const left = 104 + (start - this.from) * scale, right = left + length * scale;
      if (right < 104 || left > wide) continue;
      // What is narrower than a pixel is drawn once a pixel.
      if (right - last[stream] < 0.4) continue;
      last[stream] = right;
      const phaseName = this.data.phases[phase];
      pen.globalAlpha = this.phase && this.phase !== phaseName ? 0.15 : 1;
      pen.fillStyle = colours[phaseName] || colour("line");
      const x = Math.max(left, 104), w = Math.max(right - x - (right - left > 3 ? 0.5 : 0), 0.7);
      pen.fillRect(x, TOP + ROW * stream, w, ROW - 8);
      if (w > 46) {
        pen.fillStyle = colour("on-strong");
        pen.save();
        pen.beginPath();
        pen.rect(x, TOP + ROW * stream, w, ROW - 8);
        pen.clip();
        pen.fillText(this.data.names[name], x + 4, TOP + ROW * stream + 23);
        pen.restore();
      }
    }
    pen.globalAlpha = 1;
  }

  ticks(pen, high, colour) {
    const span = (this.to - this.from) / 1e9;
    const step = 10 ** Math.floor(Math.log10(span / 3));
    const each = span / step > 12 ? step * 5 : span / step > 6 ? step * 2 : step;
    const scale = this.scale();
    for (let at = Math.ceil(this.from / 1e9 / each) * each; at <= this.to / 1e9; at += each) {
      const x = 104 + (at * 1e9 - this.from) * scale;
      pen.fillStyle = colour("edge");
      pen.fillRect(x, 16, 1, high - 20);
      pen.fillStyle = colour("quiet");
      pen.fillText(secondsText(at), x + 3, 14);
    }
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const time = this.from + (event.clientX - box.left - 104) / this.scale();
    const stream = Math.floor((event.clientY - box.top - TOP) / ROW);
    const near = 2 / this.scale();
    return this.data.events.find(([, row, , start, length]) =>
      row === stream && start - near <= time && time <= start + length + near);
  }

  // A redistribution's event is called by its collective and its value.
  elementOf(name) {
    if (this.byName.has(name)) return this.byName.get(name);
    for (const [value, at] of this.values) {
      if (name.endsWith(` ${value}`) || name.includes(` ${value} `)) return at;
    }
    return null;
  }

  zoom(factor, middle) {
    const width = Math.min((this.to - this.from) * factor, this.total);
    const share = (middle - this.from) / (this.to - this.from);
    this.move(Math.max(middle - width * share, 0), width);
  }

  move(from, width) {
    this.from = Math.min(Math.max(from, 0), Math.max(this.total - width, 0));
    this.to = this.from + Math.max(width, 100);
    this.draw();
  }

  onWheel(event) {
    event.preventDefault();
    const box = this.canvas.getBoundingClientRect();
    const middle = this.from + (event.clientX - box.left - 104) / this.scale();
    this.zoom(event.deltaY > 0 ? 1.25 : 0.8, middle);
  }

  onDown(event) {
    this.drag = { x: event.clientX, from: this.from, moved: false };
    this.canvas.setPointerCapture(event.pointerId);
  }

  onMove(event) {
    if (this.drag) {
      const by = (event.clientX - this.drag.x) / this.scale();
      if (Math.abs(event.clientX - this.drag.x) > 3) this.drag.moved = true;
      if (this.drag.moved) this.move(this.drag.from - by, this.to - this.from);
      return;
    }
    const found = this.at(event);
    if (found) this.tell(found);
  }

  tell([name, , phase, start, length]) {
    this.hover.textContent = `${this.data.names[name]}: ${this.data.phases[phase]}, ` +
      `${secondsText(length / 1e9)} from ${secondsText(start / 1e9)} on`;
  }

  onUp(event) {
    const moved = this.drag && this.drag.moved;
    this.drag = null;
    const found = moved ? null : this.at(event);
    if (!found) return;
    this.tell(found);
    const element = this.elementOf(this.data.names[found[0]]);
    if (element !== null) this.events.select(element, true);
  }

  onKey(event) {
    const width = this.to - this.from, middle = (this.from + this.to) / 2;
    if (event.key === "ArrowLeft") this.move(this.from - width / 8, width);
    else if (event.key === "ArrowRight") this.move(this.from + width / 8, width);
    else if (event.key === "+" || event.key === "=") this.zoom(0.7, middle);
    else if (event.key === "-") this.zoom(1.4, middle);
    else if (event.key === "0") this.move(0, this.total);
    else return;
    event.preventDefault();
  }
}
