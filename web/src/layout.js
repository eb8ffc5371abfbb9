// Places of all that is drawn: each open container is laid out by itself, from the inside out, so
// that the work grows with what is open and not with the square of it.

import { Graph, layout } from "@dagrejs/dagre";

const PADDING = 16, TITLE = 22;

const isRim = (id) => id === "in" || id === "out";

export function place(model, size) {
  const edges = model.edges();
  const inner = new Map(); // per open container: its own layout
  const holder = new Map(); // per drawn id: the container that it is directly in
  const sizes = new Map();

  function measure(item) {
    const graph = new Graph();
    graph.setGraph({ rankdir: "TB", nodesep: 16, ranksep: 30, ranker: "tight-tree" });
    graph.setDefaultEdgeLabel(() => ({}));
    for (const child of model.children(item)) {
      const box = child.open ? measure(child) : size(child);
      add(graph, child.id, box, item);
    }
    for (const element of item.elements) add(graph, `e${element}`, size(element), item);
    inner.set(item.id, graph);
    return graph;
  }

  function add(graph, id, box, item) {
    holder.set(id, item);
    if (box instanceof Graph) sizes.set(id, null);
    else {
      sizes.set(id, box);
      graph.setNode(id, { width: box.width, height: box.height });
    }
    if (box instanceof Graph) graph.setNode(id, { width: 1, height: 1 });
  }

  measure(model.root);

  // An edge is placed where its two ends are side by side: in the innermost container around both.
  const byId = new Map(model.containers.map((item) => [item.id, item]));
  // One that goes into a container, or out of it, is led to its rim there, around what lies in it.
  const ways = [];
  for (const [source, target] of edges) {
    const from = chain(source), to = chain(target);
    let depth = 0;
    while (from[depth] && from[depth] === to[depth]) depth += 1;
    const around = holder.get(from[depth]);
    if (!from[depth] || !to[depth] || !around) continue;
    const way = [];
    for (let at = from.length - 1; at > depth; at--) way.push([from[at - 1], from[at], "out"]);
    way.push([around.id, from[depth], to[depth]]);
    for (let at = depth + 1; at < to.length; at++) way.push([to[at - 1], "in", to[at]]);
    for (const [id, one, other] of way) {
      const graph = inner.get(id);
      for (const rim of ["in", "out"]) {
        if ([one, other].includes(rim) && !graph.hasNode(rim)) {
          graph.setNode(rim, { width: 1, height: 1 });
        }
      }
      graph.setEdge(one, other);
    }
    ways.push([`${source} ${target}`, way]);
  }

  function chain(id) {
    const ids = [id];
    for (let item = holder.get(id); item && item !== model.root; item = holder.get(item.id)) {
      ids.unshift(item.id);
    }
    return ids;
  }

  const trims = new Map();

  function solve(item) {
    const graph = inner.get(item.id);
    for (const child of model.children(item)) {
      if (!child.open) continue;
      const box = solve(child);
      const title = 8 * child.name.length + 70;
      graph.setNode(child.id, {
        width: Math.max(box.width, Math.min(title, 260)) + 2 * PADDING,
        height: box.height + 2 * PADDING + TITLE,
      });
    }
    if (graph.nodeCount()) layout(graph);
    // The rims are no boxes: their rows take no room.
    const boxes = graph.nodes().filter((id) => !isRim(id)).map((id) => graph.node(id));
    const top = Math.min(...boxes.map((box) => box.y - box.height / 2));
    const bottom = Math.max(...boxes.map((box) => box.y + box.height / 2));
    const wide = Math.max(graph.graph().width || 0, 40);
    trims.set(item.id, { top, wide });
    return { width: wide, height: Math.max(bottom - top, 20) };
  }

  solve(model.root);
  const points = new Map(), corners = new Map();

  function put(item, left, top) {
    const graph = inner.get(item.id);
    corners.set(item.id, [left, top]);
    for (const id of graph.nodes()) {
      const node = graph.node(id);
      if (isRim(id)) continue;
      const x = left + node.x, y = top + node.y;
      const child = byId.get(id);
      if (child && child.open) {
        const { top: trim, wide } = trims.get(id);
        put(child, x - wide / 2, y - node.height / 2 + PADDING + TITLE - trim);
      } else {
        points.set(id, { x, y });
      }
    }
  }

  put(model.root, 0, 0);
  const bends = new Map();
  for (const [key, way] of ways) {
    const bend = [];
    for (const [id, one, other] of way) {
      const edge = inner.get(id).edge(one, other), [left, top] = corners.get(id);
      // Its ends lie on boxes and rims, between which it need not touch anything.
      for (const { x, y } of ((edge && edge.points) || []).slice(1, -1)) {
        bend.push({ x: x + left, y: y + top });
      }
    }
    bends.set(key, bend);
  }
  return { points, edges, holder, bends };
}
