// The plan on its grid: choose a query token, see what becomes of every key.

const [NOT, FULL, PARTIAL, PROXY, MASKED] = [0, 1, 2, 3, 4];
const STATES = [[FULL, "--p-full", "attended, full block"], [PARTIAL, "--p-part", "attended, partial block"],
  [MASKED, "--p-mask", "visited but masked out"], [PROXY, "--p-proxy", "pooled proxy stands in"], [NOT, "--p-not", "not visited"]];

function unpack(text, Kind) {
  if (!text) return null;
  return new Kind(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

function openPlan(p) {
  return { ...p, qBlock: unpack(p.qBlock, Int16Array), kBlock: unpack(p.kBlock, Int16Array), kinds: unpack(p.kinds, Int8Array),
    low: unpack(p.low, Int16Array), high: unpack(p.high, Int16Array), coord: unpack(p.coord, Int16Array), bits: unpack(p.bits, Uint8Array) };
}

// State of every key token for one query token; the twin of PlanView.states.
function statesOf(p, query, head) {
  const out = new Uint8Array(p.keys), row = p.qBlock[query];
  if (row < 0) return out;
  const base = (head * p.rows + row) * p.cols, bytes = Math.ceil(p.cols / 8);
  for (let key = 0; key < p.keys; key++) {
    const block = p.kBlock[key];
    if (block < 0) continue;
    let state = p.kinds[base + block];
    if (state === PARTIAL) {
      for (let a = 0; a < p.axes && state === PARTIAL; a++) {
        const c = p.coord[a * p.keys + key];
        if (c < p.low[a * p.queries + query] || c >= p.high[a * p.queries + query]) state = MASKED;
      }
      if (p.bits && !((p.bits[(head * p.queries + query) * bytes + (block >> 3)] >> (block & 7)) & 1)) state = MASKED;
    }
    out[key] = state;
  }
  return out;
}

class PlanView {
  constructor(root, data) {
    this.root = root;
    this.plans = data.plans.map(openPlan);
    this.picture = data.picture;
    this.mode = "plan";
    this.head = 0;
    const chips = this.plans.map((p, i) => make("button", { type: "button", onclick: () => this.choose(i) },
      make("i", { class: `swatch c${p.colour}`, "aria-hidden": "true" }), p.label));
    this.chips = chips;
    this.frames = make("div", { class: "frames", tabindex: 0, role: "group" });
    this.frames.setAttribute("aria-label", "Token grid of the query. Arrow keys move the query; comma and full stop change its frame.");
    this.frames.addEventListener("keydown", (e) => this.key(e));
    this.others = make("div", { class: "others", hidden: true });
    this.say = make("p", { class: "say", "aria-live": "polite" });
    this.legend = make("p", { class: "legend keys" });
    this.slider = make("input", { type: "range", min: 0, oninput: () => this.move(0, 0, Number(this.slider.value) - this.at[0]) });
    this.matrix = make("canvas", { class: "matrix", role: "img", onclick: (e) => this.pickRow(e) });
    this.where = make("div", { class: "where" }, make("label", {}, "Frame of the query ", this.slider));
    this.addHeads();
    if (this.picture) this.addModes();
    const side = make("div", {}, this.say, this.matrix, make("p", { class: "legend" }, "All blocks: query blocks run down, key blocks to the right. Click a row."));
    root.append(make("div", { class: "tablist", role: "group", "aria-label": "Method" }, ...chips), this.where, this.legend,
      make("div", { class: "stage" }, make("div", {}, this.frames, this.others), side));
    root.hidden = false;
    this.choose(0);
    new ResizeObserver(() => this.fit()).observe(this.frames);
    onTheme(() => this.draw());
  }

  addModes() {
    const buttons = ["plan", "picture"].map((mode) => make("button", { type: "button", "aria-pressed": String(mode === this.mode), onclick: () => {
      this.mode = mode;
      buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(["plan", "picture"][i] === mode)));
      this.draw();
    } }, mode === "plan" ? "Blocks" : "What it sees"));
    this.where.append(make("span", { class: "pair", role: "group", "aria-label": "Drawing" }, ...buttons));
    sprite(this.picture.sprite).then((image) => { this.image = image; this.draw(); });
  }

  addHeads() {
    if (!this.plans.some((p) => p.heads > 1)) return;
    this.heads = make("select", { "aria-label": "Head", onchange: () => { this.head = this.heads.selectedIndex; this.draw(); } });
    this.where.append(this.heads);
  }

  choose(index) {
    const before = this.plan;
    this.plan = this.plans[index];
    this.chips.forEach((chip, i) => chip.setAttribute("aria-pressed", String(i === index)));
    const [t, h, w] = this.plan.grid;
    if (!this.at || String(before.grid) !== String(this.plan.grid)) this.at = [t >> 1, h >> 1, w >> 1];
    if (this.heads) {
      this.head = Math.min(this.head, this.plan.heads - 1);
      this.heads.replaceChildren(...Array.from({ length: this.plan.heads }, (_, i) => make("option", { selected: i === this.head }, `head ${i}`)));
    }
    this.slider.max = t - 1;
    this.slider.closest("label").hidden = t < 2;
    this.frames.classList.toggle("few", t === 1);
    this.frames.style.setProperty("--cols", t > 40 ? 12 : t > 18 ? 8 : t > 8 ? 6 : t > 4 ? 4 : t);
    this.canvases = Array.from({ length: t }, (_, i) => make("canvas", { onclick: (e) => this.pick(e, i) }));
    this.frames.replaceChildren(...this.canvases.map((c, i) => make("div", { class: "frame" }, c, make("span", {}, t > 1 ? `${i}` : ""))));
    this.cell = 0;
    this.fit();
  }

  // Whole device pixels for every token, so that cells are sharp and equally wide.
  fit() {
    const [, h, w] = this.plan.grid, ratio = devicePixelRatio || 1;
    const room = this.canvases[0].parentElement.clientWidth * ratio;
    const cell = Math.max(1, Math.min(Math.floor(room / w), Math.ceil(480 * ratio / Math.max(h, w))));
    if (cell === this.cell) return;
    this.cell = cell;
    for (const canvas of this.canvases) {
      canvas.width = w * cell;
      canvas.height = h * cell;
      canvas.style.width = `${w * cell / ratio}px`;
    }
    this.draw();
  }

  get query() {
    const [, h, w] = this.plan.grid, [t, y, x] = this.at;
    return this.plan.visual + (t * h + y) * w + x;
  }

  pick(e, t) {
    const box = e.target.getBoundingClientRect(), [, h, w] = this.plan.grid;
    const clamp = (v, n) => Math.max(0, Math.min(n - 1, Math.floor(v)));
    this.at = [t, clamp(h * (e.clientY - box.top) / box.height, h), clamp(w * (e.clientX - box.left) / box.width, w)];
    this.draw();
  }

  pickRow(e) {
    const box = e.target.getBoundingClientRect(), p = this.plan, [, h, w] = p.grid;
    const row = Math.floor(p.rows * (e.clientY - box.top) / box.height);
    const members = [];
    for (let i = 0; i < p.grid[0] * h * w; i++) if (p.qBlock[p.visual + i] === row) members.push(i);
    if (!members.length) return;
    const i = members[members.length >> 1];
    this.at = [Math.floor(i / (h * w)), Math.floor(i / w) % h, i % w];
    this.draw();
  }

  move(dx, dy, dt) {
    const [t, h, w] = this.plan.grid, wrap = (v, n) => Math.max(0, Math.min(n - 1, v));
    this.at = [wrap(this.at[0] + dt, t), wrap(this.at[1] + dy, h), wrap(this.at[2] + dx, w)];
    this.draw();
  }

  key(e) {
    const step = { ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowUp: [0, -1, 0], ArrowDown: [0, 1, 0], ",": [0, 0, -1], ".": [0, 0, 1],
      PageUp: [0, 0, -1], PageDown: [0, 0, 1] }[e.key];
    if (step) { e.preventDefault(); this.move(...step); }
  }

  draw() {
    if (!this.plan) return;
    const p = this.plan, states = statesOf(p, this.query, this.head);
    this.colours = Object.fromEntries(STATES.map(([s, name]) => [s, colour(this.root, name)]));
    this.colours.query = colour(this.root, "--q");
    this.colours.paper = colour(this.root, "--paper");
    this.slider.value = this.at[0];
    this.canvases.forEach((canvas, t) => {
      this.drawGrid(canvas, t, states);
      canvas.parentElement.classList.toggle("now", t === this.at[0]);
    });
    this.drawOthers(states);
    this.drawMatrix();
    this.tell(states);
  }
}
