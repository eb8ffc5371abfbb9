// All that the plan says of what is chosen.

import { bytesText, escapeText as text, flopsText, secondsText } from "./words.js";

export function details(model, item) {
  if (item === null) return about(model.data);
  if (typeof item !== "number") return container(model, item);
  const element = model.data.elements[item];
  if (element.k === "sync") return sync(model, element, item);
  if (element.k === "input") return input(element);
  return op(model, element, item);
}

function table(rows, heads = null) {
  const head = heads ? `<thead><tr>${heads.map((one) => `<th scope="col">${one}</th>`).join("")}` +
    "</tr></thead>" : "";
  const body = rows.map((row) => `<tr>${row.map((cell) => `<td>${cell}</td>`).join("")}</tr>`);
  return `<div class="scroll"><table>${head}<tbody>${body.join("")}</tbody></table></div>`;
}

function facts(rows) {
  const shown = rows.filter(([, value]) => value !== "" && value !== undefined && value !== null);
  return `<dl>${shown.map(([name, value]) => `<dt>${name}</dt><dd>${value}</dd>`).join("")}</dl>`;
}

function list(rows) {
  return rows.length ? `<ul>${rows.map((row) => `<li>${text(row)}</li>`).join("")}</ul>` : "";
}

function section(name, content) {
  return content ? `<section><h3>${name}</h3>${content}</section>` : "";
}

function about(data) {
  const rows = data.about.map(([name, value]) => [text(name), text(value)]);
  const hint = "<p class='quiet'>Choose an op, a collective or a module. Double-click a module, or " +
    "press Enter in the tree, to open or close it.</p>";
  return `<h2>${text(data.model)}</h2>${facts(rows)}${section("Stays Python", list(data.stays))}${hint}`;
}

function tensors(rows) {
  return table(rows.map(([name, shape, threads, layout, change]) => [
    `<code>${text(name)}</code>`,
    `${text(shape)}${threads ? `<div class="threads-shape">${text(threads)}</div>` : ""}`,
    `<b>${text(layout)}</b>${change ? `<div class="quiet">moved ${text(change)}</div>` : ""}`,
  ]), ["tensor", "shape", "lies as"]);
}

function op(model, element, item) {
  const [seconds, forward] = element.s;
  const again = element.flops || [];
  const path = model.chains[item][model.chains[item].length - 1].path;
  const rows = [
    ["op", `<code>${text(element.target)}</code>`],
    ["module", `<code>${text(path || "(model)")}</code>`],
    ["source", element.line ? `<code>${text(element.line)}</code>` : ""],
    ["split", text(element.role || "")],
    ["threads split", text(threads(model, element))],
    ["takes", `${secondsText(seconds)}: forward ${secondsText(forward)}, backward ` +
      secondsText(Math.max(seconds - forward, 0))],
    ["computes", again.length ? `${flopsText(again[0])} of ${flopsText(again[1])} on each rank` : ""],
    ["kernel", text((element.kernels || []).join(", "))],
    ["rule found by trial", text(element.rule || "")],
    ["left whole", text(element.reason || "")],
    ["splitting it costs", element.added ? `${secondsText(element.added)} more a step` : ""],
  ];
  return `<h2>${text(element.t)} <small>${text(element.n)}</small></h2>${facts(rows)}` +
    section("Why", list(element.why || [])) +
    section("Reads", tensors(element.in)) + section("Makes", tensors(element.out)) +
    section("Alternatives", alternatives(model, element)) +
    section("What it does with its threads", loops(element)) +
    section("Parameters", parameters(model, element.params || []));
}

function threads(model, element) {
  const axes = model.data.mesh.map(([name]) => name);
  return (element.split || []).map((name, at) => (name ? `${name} on ${axes[at]}` : ""))
    .filter(Boolean).join(", ");
}

// A plan of a small model is made as if its products took longer, and its costs are told so.
function weighted(model) {
  const { weight } = model.data;
  return weight === 1 ? "" : `<p class="quiet">Seconds of alternatives are weighted as the plan's
    cost: a matrix product counts up to ${text(String(weight))} times.</p>`;
}

function alternatives(model, element) {
  if (!element.alt || !element.alt.length) return "";
  return weighted(model) + table(element.alt.map(([what, seconds, anew, why]) => [
    text(what), more(seconds), anew === null ? "" : more(anew), text(why),
  ]), ["instead", "all else as planned", "all planned anew", "why it lost"]);
}

// What costs less by the sum of seconds has a longer step, in which work overlaps.
function anewText(seconds) {
  return more(seconds) + (seconds < -1e-9 ? ", but for its step" : "");
}

// Less than a nanosecond is what sums in another order leave.
function more(seconds) {
  return seconds > 1e-9 ? `+${secondsText(seconds)}` : "no dearer";
}

const FATES = {
  free: "passes free", summed: "is summed", kernel: "needs the other parts", whole: "is needed whole",
};

function loops(element) {
  if (!element.loops || !element.loops.length) return "";
  return table(element.loops.map(([name, fate, more, gradients]) => [
    text(name), FATES[fate] + (more ? ` <span class="quiet">(${text(more)})</span>` : ""),
    gradients ? `${gradients} gradient${gradients > 1 ? "s" : ""} summed` : "",
  ]), ["thread", "forward", "backward"]);
}

function parameters(model, numbers) {
  if (!numbers.length) return "";
  const shown = numbers.slice(0, 24).map((number) => model.data.parameters[number]);
  const rows = shown.map((row) => {
    const [path, shape, size, split, stored, gradient, state, reason, added, instead] = row;
    const lies = stored === gradient && stored === state
      ? text(stored) : `${text(stored)}; gradient ${text(gradient)}; state ${text(state)}`;
    const why = reason ? `<div class="quiet">${text(reason)}${added ? `: ${added} more` : ""}</div>` : "";
    return [`<code>${text(path)}</code><div class="quiet">${text(shape)} · ${size}</div>`,
      `${text(split)}<div class="quiet">stored ${lies}</div>${why}`, instead.length
        ? `<ul>${instead.map(([told, anew]) => `<li>${text(told)}: ${anewText(anew)}</li>`).join("")}</ul>`
        : ""];
  });
  const rest = numbers.length - shown.length;
  return weighted(model) + table(rows, ["parameter", "split", "instead, all planned anew"]) +
    (rest > 0 ? `<p>and ${rest} more</p>` : "");
}

function sync(model, element, item) {
  const path = model.chains[item][model.chains[item].length - 1].path;
  const rows = [
    ["value", `<code>${text(element.n)}</code>`],
    ["module", `<code>${text(path || "(model)")}</code>`],
    ["source", element.line ? `<code>${text(element.line)}</code>` : ""],
    ["shape", text(element.shape)],
    ["threads", text(element.threads)],
    ["size", bytesText(element.nb)],
    ["from → to", text(element.change)],
    ["takes", secondsText(element.s[0])],
    ["for", `<code>${text(element.readers.join(", "))}</code>`],
    ["made again", element.again ? "the copy is dropped, and made once more in the backward pass" : ""],
  ];
  const moves = table(element.moves.map(([phase, axis, kind, nbytes]) => [
    phase, axis, kind, bytesText(nbytes)]), ["phase", "axis", "collective", "size"]);
  return `<h2>${text(element.t)} <small>${text(element.n)}</small></h2>${facts(rows)}` +
    section("Why", list(element.why)) + section("What crosses the links", moves) +
    section("Alternatives", without(model, element.alt || []));
}

function without(model, rows) {
  return rows.length ? weighted(model) + table(rows.map(([what, anew]) => [
    text(what), anew === null ? "no plan has that" : anewText(anew)]), ["instead", "all planned anew"]) : "";
}

function input(element) {
  const [, shape, named] = element.out[0];
  return `<h2>${text(element.n)}</h2>${facts([["shape", text(shape)], ["threads", text(named)]])}`;
}

function container(model, chosen) {
  const item = model.standsFor(chosen) || chosen;
  const total = model.sums(item);
  const sends = [...total.sends].map(([key, [count, nbytes]]) => {
    const [phase, axis, kind] = key.split("|");
    return [phase, axis, kind, String(count), bytesText(nbytes)];
  });
  const rows = [
    ["module", `<code>${text(item.path || "(model)")}</code>`],
    ["equal modules", item.kind === "run" ? `${item.count}; the first is shown for all` : ""],
    ["ops", String(total.ops)],
    ["takes", `${secondsText(total.seconds)} in all, ops forward ${secondsText(total.forward)}`],
  ];
  const title = item.kind === "run" ? `${item.path} × ${item.count}` : item.name;
  return `<h2>${text(title)}</h2>${facts(rows)}` +
    section("What crosses the links", sends.length
      ? table(sends, ["phase", "axis", "collective", "number", "size"]) : "") +
    section("Parameters", parameters(model, [...total.parameters]));
}
