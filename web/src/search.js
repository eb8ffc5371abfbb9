// Search over ops, collectives, modules and parameters.

import { escapeText } from "./words.js";

const MOST = 60;

export class Search {
  constructor(input, results, status, model, events) {
    this.input = input;
    this.results = results;
    this.status = status;
    this.events = events;
    this.rows = rowsOf(model);
    this.found = [];
    this.chosen = -1;
    input.addEventListener("input", () => this.run());
    input.addEventListener("keydown", (event) => this.onKey(event));
    input.addEventListener("blur", () => setTimeout(() => this.close(), 200));
    results.addEventListener("mousedown", (event) => {
      const row = event.target.closest("[data-at]");
      if (row) this.take(Number(row.dataset.at));
    });
  }

  run() {
    const words = this.input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = words.length
      ? this.rows.filter((row) => words.every((word) => row.text.includes(word))) : [];
    this.count = found.length;
    this.found = found.slice(0, MOST);
    this.chosen = this.found.length ? 0 : -1;
    this.show();
    const many = found.length > MOST ? `, the first ${MOST} are listed` : "";
    this.status.textContent = words.length ? `${found.length} found${many}` : "";
  }

  show() {
    this.results.hidden = !this.found.length;
    this.input.setAttribute("aria-expanded", String(Boolean(this.found.length)));
    this.results.innerHTML = this.found.map((row, at) =>
      `<li role="option" id="found-${at}" data-at="${at}" aria-selected="${at === this.chosen}">` +
      `<b>${escapeText(row.name)}</b> <span class="quiet">${escapeText(row.more)}</span></li>`).join("");
    if (this.chosen >= 0) {
      this.input.setAttribute("aria-activedescendant", `found-${this.chosen}`);
      this.results.children[this.chosen].scrollIntoView({ block: "nearest" });
    } else this.input.removeAttribute("aria-activedescendant");
  }

  onKey(event) {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const step = event.key === "ArrowDown" ? 1 : -1;
      if (this.found.length) {
        this.chosen = (this.chosen + step + this.found.length) % this.found.length;
        this.show();
      }
    } else if (event.key === "Enter" && this.chosen >= 0) this.take(this.chosen);
    else if (event.key === "Escape") {
      this.input.value = "";
      this.run();
      this.input.blur();
    } else return;
    event.preventDefault();
  }

  take(at) {
    const row = this.found[at];
    this.close();
    this.events.find(row.item);
  }

  close() {
    this.found = [];
    this.chosen = -1;
    this.show();
  }
}

function rowsOf(model) {
  const rows = [];
  for (const item of model.containers) {
    if (item.path) rows.push(row(item, item.path, item.kind === "run" ? "equal modules" : "module"));
  }
  const { elements, parameters } = model.data;
  elements.forEach((element, at) => {
    const path = model.chains[at][model.chains[at].length - 1].path;
    if (element.k === "op") rows.push(row(at, element.n, `${element.target} ${path} ${element.line}`));
    else if (element.k === "sync") rows.push(row(at, `${element.t} of ${element.n}`, path));
    else rows.push(row(at, element.n, ""));
  });
  const reader = new Map();
  elements.forEach((element, at) => {
    for (const number of element.params || []) if (!reader.has(number)) reader.set(number, at);
  });
  parameters.forEach((parameter, number) => {
    if (reader.has(number)) rows.push(row(reader.get(number), parameter[0], `parameter, ${parameter[3]}`));
  });
  return rows;
}

function row(item, name, more) {
  return { item, name, more, text: `${name} ${more}`.toLowerCase() };
}
