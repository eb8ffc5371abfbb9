// Numbers and texts as a reader writes them.

export function secondsText(seconds) {
  if (!seconds) return "0 s";
  const units = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]];
  const [size, name] = units.find(([unit]) => Math.abs(seconds) >= unit) || units[3];
  return `${Number((seconds / size).toPrecision(3))} ${name}`;
}

export function bytesText(nbytes) {
  const names = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (nbytes >= 1024 && at < names.length - 1) {
    nbytes /= 1024;
    at += 1;
  }
  return `${at ? Number(nbytes.toPrecision(3)) : Math.round(nbytes)} ${names[at]}`;
}

export function flopsText(flops) {
  const names = ["", "K", "M", "G", "T", "P", "E"];
  let at = 0;
  while (flops >= 1000 && at < names.length - 1) {
    flops /= 1000;
    at += 1;
  }
  return `${Number(flops.toPrecision(3))} ${names[at]}FLOP`;
}

export function escapeText(text) {
  const marks = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
  return String(text).replace(/[&<>"']/g, (mark) => marks[mark]);
}

export function shortText(text, letters) {
  return text.length <= letters ? text : `${text.slice(0, letters - 1)}…`;
}
