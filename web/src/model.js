// The plan's modules as a tree of containers, and which element stands for which in a folded run.

export class Model {
  constructor(data) {
    this.data = data;
    this.containers = [];
    this.chains = new Array(data.elements.length); // per element: its containers, outermost first
    this.root = this.container(data.tree, null, "module");
    this.root.open = true;
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
        id: `m${this.containers.length}`, kind: "run", parent: item, path: prefix + name, name,
        open: false, unfolded: false, items: [], elements: [], count, run: null, place: 0, all: null,
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
    const chain = [];
    for (let one = item; one; one = one.parent) chain.unshift(one);
    for (const element of item.elements) this.chains[element] = chain;
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

  // Open what a reader wants to see first: down to the blocks, and the first of these.
  openFirst() {
    let open = [this.root];
    while (open.length === 1 && open[0]) {
      const item = open[0];
      item.open = true;
      open = item.items.filter((child) => this.inside(child).length > 3);
      if (open.length > 1 && open.length < 5) {
        for (const child of open) if (child.kind === "run") child.open = child.items[0].open = true;
        for (const child of open) if (!child.items.length) child.open = true;
        const nested = open.filter((child) => child.items.some((one) => one.kind === "run"));
        open = nested.length === 1 ? nested : [];
      }
    }
    for (const item of this.containers) {
      if (item.kind === "run" && item.parent.open) item.open = item.items[0].open = true;
    }
  }

  shown(run) {
    return run.unfolded ? run.items : run.items.slice(0, 1);
  }

  // The items of an open container that are drawn, elements apart.
  children(item) {
    return item.kind === "run" ? this.shown(item) : item.items;
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
      item.open = open || item === this.root;
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
