// Drawing of the plan view: the frames of the grid, tokens off the grid, the block matrix, the sentence.

Object.assign(PlanView.prototype, {
  drawGrid(canvas, t, states) {
    const p = this.plan, [, h, w] = p.grid, s = this.cell, context = canvas.getContext("2d");
    const seen = this.mode === "picture" && this.image;
    const gap = s >= 5 && !seen ? 1 : 0, start = p.visual + t * h * w;
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (seen) {
      const frame = Math.min(this.picture.frames - 1, Math.floor((t + 0.5) * this.picture.frames / p.grid[0]));
      drawFrame(context, this.image, this.picture, frame, canvas.width, canvas.height);
    }
    for (let i = 0; i < h * w; i++) {
      const state = states[start + i], x = (i % w) * s, y = Math.floor(i / w) * s;
      if (seen) {
        if (state === FULL || state === PARTIAL) continue;
        context.globalAlpha = state === PROXY ? 0.6 : 0.86;
        context.fillStyle = this.colours.paper;
      } else context.fillStyle = this.colours[state];
      context.fillRect(x, y, s - gap, s - gap);
    }
    context.globalAlpha = 1;
    this.outline(context, start, h, w, s);
    if (t === this.at[0]) {
      context.fillStyle = this.colours.query;
      context.fillRect(this.at[2] * s, this.at[1] * s, s - gap, s - gap);
    }
  },

  // The border of the query's own block.
  outline(context, start, h, w, s) {
    const p = this.plan, mine = p.qBlock[this.query], line = Math.max(2, s / 5);
    if (mine < 0) return;
    const inside = (x, y) => x >= 0 && y >= 0 && x < w && y < h && p.qBlock[start + y * w + x] === mine;
    context.fillStyle = this.colours.query;
    for (let y = 0; y < h; y++) {
      for (let x = 0; x < w; x++) {
        if (!inside(x, y)) continue;
        if (!inside(x - 1, y)) context.fillRect(x * s, y * s, line, s);
        if (!inside(x + 1, y)) context.fillRect((x + 1) * s - line, y * s, line, s);
        if (!inside(x, y - 1)) context.fillRect(x * s, y * s, s, line);
        if (!inside(x, y + 1)) context.fillRect(x * s, (y + 1) * s - line, s, line);
      }
    }
  },

  // Keys that are not on the grid (text, references): one bar, a cell a token.
  drawOthers(states) {
    const p = this.plan, size = p.grid[0] * p.grid[1] * p.grid[2], n = p.keys - size;
    this.others.hidden = n <= 0;
    if (n <= 0) return;
    const canvas = make("canvas", { width: n, height: 1 }), context = canvas.getContext("2d");
    let x = 0;
    for (let key = 0; key < p.keys; key++) {
      if (key >= p.visual && key < p.visual + size) continue;
      context.fillStyle = this.colours[states[key]];
      context.fillRect(x++, 0, 1, 1);
    }
    this.others.replaceChildren(`${count(n)} tokens that are not on the grid (text)`, canvas);
  },

  drawMatrix() {
    const p = this.plan, canvas = this.matrix, scale = Math.max(1, Math.floor(500 / Math.max(p.rows, p.cols)));
    canvas.width = p.cols * scale;
    canvas.height = p.rows * scale;
    const context = canvas.getContext("2d"), mine = p.qBlock[this.query];
    for (let r = 0; r < p.rows; r++) {
      for (let c = 0; c < p.cols; c++) {
        context.fillStyle = this.colours[p.kinds[(this.head * p.rows + r) * p.cols + c]];
        context.fillRect(c * scale, r * scale, scale, scale);
      }
    }
    context.strokeStyle = this.colours.query;
    context.lineWidth = Math.max(2, Math.round(canvas.width / 125));
    if (mine >= 0) context.strokeRect(0, mine * scale, canvas.width, Math.max(scale, 2));
    canvas.setAttribute("aria-label", `${p.rows} query blocks by ${p.cols} key blocks, density ${percent(p.density)}`);
  },

  tell(states) {
    const p = this.plan, tally = [0, 0, 0, 0, 0];
    for (const state of states) tally[state]++;
    const attended = tally[FULL] + tally[PARTIAL], [t, y, x] = this.at;
    const place = `${p.grid[0] > 1 ? `frame ${t}, ` : ""}row ${y}, column ${x}`;
    const extra = [tally[MASKED] ? `${count(tally[MASKED])} more are visited but masked out` : "", tally[PROXY] ? `${count(tally[PROXY])} are seen as pooled proxies` : ""];
    this.say.replaceChildren(make("strong", {}, percent(attended / p.keys)),
      `of the keys (${count(attended)} of ${count(p.keys)}) are attended by the query at ${place}`
      + `${extra.filter(Boolean).map((e) => `; ${e}`).join("")}. The whole plan: density ${percent(p.density)}, visited ${percent(p.visited)}.`);
    const kinds = new Set(p.kinds);
    const used = STATES.filter(([s]) => tally[s] || kinds.has(s) || (s === MASKED && kinds.has(PARTIAL)));
    const swatches = used.map(([, name, text]) => make("span", {}, make("i", { style: `background:var(${name})` }), text));
    this.legend.replaceChildren(make("span", {}, make("i", { style: "background:var(--q)" }), "the query and its block"), ...swatches);
  },
});
