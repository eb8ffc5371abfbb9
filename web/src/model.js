// The plan's modules as a tree of containers, and which element stands for which in a folded run.

export class Model {
  constructor(data) {
    this.data = data;
    this.containers = [];
    this.chains = new Array(data.elements.length); // per element: its containers, outermost first
    this.root = this.container(data.tree, null, "module");
    this.root.open = true;
    for (const item of this.containers) {
      for (const element of item.elements) this.chains[element] = this.chainOf(item);
    }
    this.readers = data.elements.map(() => []);
    this.makers = data.elements.map(() => []);
    for (const [from, to] of data.edges) {
      this.readers[from].push(to);
      this.makers[to].push(from);
    }
    this.openFirst();
  }

  // A container is a module, or a run of equal modules, which shows the first one for all.
  container(row, parent, kind) {
    const item = {
      id: `m${this.containers.length}`, kind, parent, path: row.p, open: false,
      name: row.p.slice(row.p.lastIndexOf(".") + 1) || this.data.model,
      items: [], elements: row.e || [], run: null, place: 0, all: null,
    };
    this.containers.push(item);
    const children = row.c || [];
    const starts = new Map((row.r || []).map(([name, at, count]) => [at, [name, count]]));
    for (let at = 0; at < children.length; at++) {
      if (!starts.has(at)) {
        item.items.push(this.container(children[at], item, "module"));
        continue;
      }
      const [name, count] = starts.get(at);
      const prefix = row.p ? `${row.p}.` : "";
      const run = {
        id: `m${this.containers.length}`, kind: "run", parent: item, path: prefix + name,
        name: prefix.slice(prefix.lastIndexOf(".", prefix.length - 2) + 1) + name,
        open: true, unfolded: false, items: [], elements: [], count, run: null, place: 0, all: null,
      };
      this.containers.push(run);
      item.items.push(run);
      for (let place = 0; place < count; place++) {
        const member = this.container(children[at + place], run, "module");
        member.run = run;
        member.place = place;
        run.items.push(member);
      }
      at += count - 1;
    }
    // A list of nothing but equal modules is no more than these.
    const only = item.items[0];
    if (parent && item.items.length === 1 && !item.elements.length && only.kind === "run") {
      only.parent = parent;
      item.isList = true;
      return only;
    }
    return item;
  }

  // All elements of a container and of those in it; equal modules have them in one order.
  inside(item) {
    if (!item.all) {
      item.all = [...item.elements];
      for (const child of item.items) item.all.push(...this.inside(child));
      item.places = new Map(item.all.map((element, at) => [element, at]));
    }
    return item.all;
  }

  // Open what a reader wants to see first: the way down to the equal modules, the first of these,
  // and what is in it, as long as that fits a screen or two.
  openFirst() {
    const runs = this.containers.filter((item) => item.kind === "run");
    const sizes = new Map(runs.map((run) => [run, this.inside(run).length]));
    const largest = runs.sort((a, b) => sizes.get(b) - sizes.get(a))[0];
    if (largest) {
      for (const item of this.chainOf(largest)) item.open = true;
      this.openSmall(largest.items[0], 60);
    }
    if (!runs.length) this.openSmall(this.root, 60);
  }

  openSmall(item, most) {
    item.open = true;
    const inside = this.inside(item).length;
    for (const child of item.items) {
      if (inside <= most && !child.name.startsWith("(")) this.openSmall(child, most);
    }
  }

  // What is drawn in an open container, elements apart: of a folded run the first module.
  children(item) {
    return item.items.map((one) => (one.kind === "run" && !one.unfolded ? one.items[0] : one));
  }

  // The run that a module stands for, null where it stands for itself.
  standsFor(item) {
    return typeof item !== "number" && item.run && !item.run.unfolded ? item.run : null;
  }

  // What collectives are inside, the most frequent first.
  sends(item) {
    if (!item.sent) {
      const counts = new Map();
      for (const number of this.inside(item)) {
        const element = this.data.elements[number];
        if (element.k === "sync") counts.set(element.t, (counts.get(element.t) || 0) + 1);
      }
      item.sent = [...counts].sort((a, b) => b[1] - a[1]).map(([name]) => name);
    }
    return item.sent;
  }

  // The element that stands for one in a folded run.
  twin(element) {
    for (let again = true; again; ) {
      again = false;
      for (const item of this.chains[element]) {
        if (item.run && item.place && !item.run.unfolded) {
          this.inside(item);
          const at = item.places.get(element);
          element = this.inside(item.run.items[0])[at];
          again = true;
          break;
        }
      }
    }
    return element;
  }

  // The id of what is drawn for an element: itself, or the outermost closed container around it.
  visible(element) {
    for (const item of this.chains[element]) if (!item.open) return item.id;
    return `e${element}`;
  }

  // Whether an edge leads from one member of a folded run to another, which is not drawn.
  isHidden(from, to) {
    const one = this.chains[from], other = this.chains[to];
    for (let at = 0; at < Math.min(one.length, other.length); at++) {
      if (one[at] === other[at]) continue;
      return Boolean(one[at].run && one[at].run === other[at].run && !one[at].run.unfolded);
    }
    return false;
  }

  edges() {
    const edges = new Map();
    for (const [from, to] of this.data.edges) {
      if (this.isHidden(from, to)) continue;
      const source = this.visible(this.twin(from)), target = this.visible(this.twin(to));
      if (source !== target) edges.set(`${source} ${target}`, [source, target]);
    }
    return [...edges.values()];
  }

  // Open all that is around an element or container, so that it is drawn.
  reveal(target) {
    const chain = typeof target === "number" ? this.chains[target] : this.chainOf(target).slice(0, -1);
    for (const item of chain) {
      item.open = true;
      if (item.run && item.place) item.run.unfolded = true;
    }
    if (typeof target !== "number" && target.run && target.place) target.run.unfolded = true;
  }

  chainOf(item) {
    const chain = [];
    for (let one = item; one; one = one.parent) chain.unshift(one);
    return chain;
  }

  setAll(open) {
    for (const item of this.containers) {
      item.open = open || item === this.root || item.kind === "run";
      if (item.kind === "run") item.unfolded = false;
    }
  }

  // Sums over a container: what it takes, and what it sends.
  sums(item) {
    const total = { seconds: 0, forward: 0, ops: 0, sends: new Map(), parameters: new Set() };
    for (const number of this.inside(item)) {
      const element = this.data.elements[number];
      if (element.s) total.seconds += element.s[0];
      if (element.k === "op") {
        total.ops += 1;
        total.forward += element.s[1];
      }
      for (const [phase, axis, kind, nbytes] of element.moves || []) {
        const key = `${phase}|${axis}|${kind}`;
        const [count, bytes] = total.sends.get(key) || [0, 0];
        total.sends.set(key, [count + 1, bytes + nbytes]);
      }
      for (const parameter of element.params || []) total.parameters.add(parameter);
    }
    return total;
  }
}
