// The tree of modules beside the graph: an ARIA tree, which opens and closes the same containers.

import { escapeText, secondsText } from "./words.js";

export class TreeView {
  constructor(host, model, events) {
    this.host = host;
    this.model = model;
    this.events = events;
    this.selected = null;
    host.addEventListener("click", (event) => this.onClick(event));
    host.addEventListener("keydown", (event) => this.onKey(event));
  }

  rows() {
    const rows = [];
    const visit = (item, level) => {
      rows.push([item, level]);
      if (typeof item === "number" || !item.open) return;
      const inside = [...item.elements.map((one) => [this.order(one), one]),
        ...this.model.children(item).map((one) => [this.order(one), one])];
      inside.sort((a, b) => a[0] - b[0]);
      for (const [, one] of inside) visit(one, level + 1);
    };
    visit(this.model.root, 1);
    return rows;
  }

  // Elements are numbered as the program runs.
  order(item) {
    return typeof item === "number" ? item : Math.min(...this.model.inside(item), Infinity);
  }

  draw() {
    const hadFocus = this.host.contains(document.activeElement);
    this.items = this.rows();
    this.host.innerHTML = this.items.map(([item, level], at) => this.row(item, level, at)).join("");
    this.select(this.selected);
    if (hadFocus) this.focusChosen();
  }

  row(item, level, at) {
    const indent = `style="--level:${level}"`;
    if (typeof item === "number") {
      const element = this.model.data.elements[item];
      const name = element.k === "op" ? element.t : element.k === "sync" ? element.t : element.n;
      const more = element.k === "sync" ? element.n : element.line || "";
      return `<li role="treeitem" aria-level="${level}" data-at="${at}" tabindex="-1" class="leaf ` +
        `${element.k}" ${indent}><span class="name">${escapeText(name)}</span>` +
        `<span class="more"><bdi>${escapeText(more)}</bdi></span></li>`;
    }
    const run = item.kind === "run" ? item : this.model.standsFor(item);
    const name = run ? `${run.name} × ${run.count}` : item.name;
    const seconds = secondsText(this.model.sums(run || item).seconds);
    const fold = run && item.open
      ? `<button type="button" class="fold" data-fold="${at}" tabindex="-1">` +
        `${run.unfolded ? "show one" : "show all"}</button>` : "";
    return `<li role="treeitem" aria-level="${level}" aria-expanded="${item.open}" data-at="${at}" ` +
      `tabindex="-1" class="${run ? "run" : "module"}" ${indent}><span class="twist" aria-hidden="true">` +
      `${item.open ? "▾" : "▸"}</span><span class="name">${escapeText(name)}</span>${fold}` +
      `<span class="more">${seconds}</span></li>`;
  }

  select(item) {
    this.selected = item;
    let place = this.items ? this.items.findIndex(([one]) => one === item) : -1;
    if (place < 0 && typeof item === "number" && this.items) {
      const id = this.model.visible(this.model.twin(item));
      place = this.items.findIndex(([one]) => typeof one !== "number" && one.id === id);
    }
    for (const row of this.host.children) {
      const chosen = Number(row.dataset.at) === place;
      row.setAttribute("aria-selected", String(chosen));
      row.tabIndex = chosen || (place < 0 && row.dataset.at === "0") ? 0 : -1;
      if (chosen) row.scrollIntoView({ block: "nearest" });
    }
  }

  focusChosen() {
    const row = this.host.querySelector('[tabindex="0"]');
    if (row) row.focus();
  }

  onClick(event) {
    const fold = event.target.closest("[data-fold]");
    if (fold) {
      const [item] = this.items[Number(fold.dataset.fold)];
      this.events.unfold(item.kind === "run" ? item : item.run);
      return;
    }
    const row = event.target.closest("[data-at]");
    if (!row) return;
    const [item] = this.items[Number(row.dataset.at)];
    if (event.target.closest(".twist")) this.events.toggle(item);
    else this.events.select(item, true);
  }

  onKey(event) {
    const row = event.target.closest("[data-at]");
    if (!row) return;
    const at = Number(row.dataset.at);
    const [item, level] = this.items[at];
    const container = typeof item !== "number";
    const go = (place) => {
      if (place < 0 || place >= this.items.length) return;
      this.events.select(this.items[place][0], true);
      this.focusChosen();
    };
    const steps = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: this.items.length - 1 };
    if (event.key in steps) go(steps[event.key]);
    else if (event.key === "ArrowRight" && container && !item.open) this.events.toggle(item);
    else if (event.key === "ArrowRight" && container) go(at + 1);
    else if (event.key === "ArrowLeft" && container && item.open && level > 1) {
      this.events.toggle(item);
    } else if (event.key === "ArrowLeft") {
      let above = at - 1;
      while (above > 0 && this.items[above][1] >= level) above -= 1;
      go(above);
    } else if (event.key === "Enter" || event.key === " ") {
      if (container && level > 1) this.events.toggle(item);
      else this.events.select(item, true);
    } else return;
    event.preventDefault();
  }
}
