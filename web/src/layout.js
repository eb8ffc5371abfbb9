// Places of all that is drawn: each open container is laid out by itself, from the inside out, so
// that the work grows with what is open and not with the square of it.

import { Graph, layout } from "@dagrejs/dagre";

const PADDING = 16, TITLE = 22;

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

  // An edge is drawn where its two ends are side by side: in the innermost container around both.
  const byId = new Map(model.containers.map((item) => [item.id, item]));
  for (const [source, target] of edges) {
    const ends = [chain(source), chain(target)];
    let depth = 0;
    while (ends[0][depth] && ends[0][depth] === ends[1][depth]) depth += 1;
    const [one, other] = [ends[0][depth], ends[1][depth]];
    const around = holder.get(one);
    if (one && other && around) inner.get(around.id).setEdge(one, other);
  }

  function chain(id) {
    const ids = [id];
    for (let item = holder.get(id); item && item !== model.root; item = holder.get(item.id)) {
      ids.unshift(item.id);
    }
    return ids;
  }

  function solve(item) {
    const graph = inner.get(item.id);
    for (const child of model.children(item)) {
      if (!child.open) continue;
      const box = solve(child);
      const title = 8 * child.path.length + 30;
      graph.setNode(child.id, {
        width: Math.max(box.width, Math.min(title, 260)) + 2 * PADDING,
        height: box.height + 2 * PADDING + TITLE,
      });
    }
    if (graph.nodeCount()) layout(graph);
    const { width = 40, height = 20 } = graph.graph();
    return { width: Math.max(width, 40), height: Math.max(height, 20) };
  }

  solve(model.root);
  const points = new Map();

  function put(item, left, top) {
    const graph = inner.get(item.id);
    for (const id of graph.nodes()) {
      const node = graph.node(id);
      const x = left + node.x, y = top + node.y;
      const child = byId.get(id);
      if (child && child.open) {
        const box = inner.get(id).graph();
        const wide = Math.max(box.width || 40, 40);
        put(child, x - wide / 2, y - node.height / 2 + PADDING + TITLE);
      } else {
        points.set(id, { x, y });
      }
    }
  }

  put(model.root, 0, 0);
  return { points, edges, holder };
}
