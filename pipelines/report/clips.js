// The players: every method's clip on one clock. Space plays and stops, arrow keys step, holding a clip shows dense in its place.

function sparkline(values) {
  const finite = values.filter((v) => v !== null);
  const low = Math.min(...finite), high = Math.max(...finite, low + 1e-6);
  const points = values.map((v, i) => `${i ? "L" : "M"}${i} ${(high - (v ?? low)) / (high - low)}`).join("");
  const line = svg("line", { x1: 0, x2: 0, y1: -0.15, y2: 1.15 });
  const picture = svg("svg", { viewBox: `0 0 ${Math.max(1, values.length - 1)} 1`, preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("path", { d: points }), line);
  return { picture, move: (i) => { line.setAttribute("x1", i); line.setAttribute("x2", i); } };
}

function clipFigure(player, clip) {
  const canvas = make("canvas", { width: clip.width, height: clip.height, role: "img", tabindex: 0 });
  canvas.setAttribute("aria-label", clip.dense ? clip.label : `${clip.label}; hold Enter or the pointer to see dense in its place`);
  const flag = make("span", { class: "flag", hidden: true }, "dense");
  const db = make("span", { class: `db k${clip.colour}` });
  const text = make("span");
  const spark = clip.psnr && clip.psnr.length > 1 ? sparkline(clip.psnr) : null;
  if (clip.psnr) db.append(text);
  if (spark) db.append(spark.picture);
  const caption = make("figcaption", {}, make("i", { class: `swatch c${clip.colour}`, "aria-hidden": "true" }), clip.label, db);
  const view = { clip, canvas, context: canvas.getContext("2d"), held: false, flag, spark, text };
  const hold = (on) => { if (!clip.dense) { view.held = on; flag.hidden = !on; player.draw(); } };
  canvas.addEventListener("pointerdown", () => hold(true));
  for (const end of ["pointerup", "pointerleave", "pointercancel"]) canvas.addEventListener(end, () => hold(false));
  canvas.addEventListener("contextmenu", (e) => { if (view.held) e.preventDefault(); });
  canvas.addEventListener("keydown", (e) => { if (e.key === "Enter" && !e.repeat) hold(true); });
  canvas.addEventListener("keyup", (e) => { if (e.key === "Enter") hold(false); });
  canvas.addEventListener("blur", () => hold(false));
  view.figure = make("figure", {}, canvas, flag, caption);
  return view;
}

class Player {
  constructor(root, data) {
    Object.assign(this, { root, data, frame: 0, playing: false, different: false, seen: false, last: 0, rate: data.rate, views: [] });
    this.screen = make("div", { class: "screen" });
    this.play = make("button", { type: "button", class: "play", onclick: () => this.setPlaying(!this.playing) }, "Play");
    this.slider = make("input", { type: "range", min: 0, value: 0, "aria-label": "Frame", oninput: () => this.go(Number(this.slider.value)) });
    this.where = make("output");
    const step = (by, word, sign) => make("button", { type: "button", "aria-label": word, onclick: () => this.go(this.frame + by) }, sign);
    const rates = [2, 4, 8, 16, 24].map((r) => make("option", { value: r, selected: r === data.rate }, `${r} frames/s`));
    const speed = make("select", { "aria-label": "Speed", onchange: (e) => { this.rate = Number(e.target.value); } }, ...rates);
    this.controls = make("div", { class: "controls" }, step(-1, "One frame back", "◂"), this.play, step(1, "One frame on", "▸"), this.slider, this.where, speed);
    this.addModes();
    const hint = "Hold a clip, or press Enter on it, to see dense in its place."
      + (data.samples.some((s) => s.clips.some((c) => c.frames > 1)) ? " Space plays and stops, arrow keys step." : "");
    root.append(this.screen, this.controls);
    if (data.samples.some((s) => s.clips.length > 1)) root.append(make("p", { class: "legend" }, hint));
    root.addEventListener("keydown", (e) => this.key(e));
    root.hidden = false;
    new IntersectionObserver((entries) => { this.seen = entries[0].isIntersecting; this.tick(); }, { threshold: 0.2 }).observe(this.screen);
    this.show(0).then(() => this.setPlaying(!still.matches && this.length > 1));
  }

  addModes() {
    if (!this.data.samples.some((s) => s.clips.some((c) => c.difference))) return;
    const choose = (on) => {
      this.different = on;
      picture.setAttribute("aria-pressed", String(!on));
      difference.setAttribute("aria-pressed", String(on));
      this.draw();
    };
    const picture = make("button", { type: "button", "aria-pressed": "true", onclick: () => choose(false) }, "Picture");
    const difference = make("button", { type: "button", "aria-pressed": "false", onclick: () => choose(true) }, "Difference");
    this.difference = difference;
    this.controls.append(make("span", { class: "pair", role: "group", "aria-label": "What the clips show" }, picture, difference));
  }

  async show(index) {
    const sample = this.data.samples[index];
    this.views = sample.clips.map((clip) => clipFigure(this, clip));
    this.length = Math.max(...sample.clips.map((c) => c.frames));
    this.slider.max = this.length - 1;
    if (this.difference) this.difference.textContent = `Difference ×${sample.gain}`;
    for (const node of [this.play, this.slider, this.where]) node.hidden = this.length < 2;
    all("button[aria-label^=One], select", this.controls).forEach((b) => { b.hidden = this.length < 2; });
    const views = this.views;
    await Promise.all(views.map(async (v) => {
      v.image = await sprite(v.clip.sprite);
      v.away = v.clip.difference ? await sprite(v.clip.difference) : null;
    }));
    if (views !== this.views) return;
    this.screen.replaceChildren(...views.map((v) => v.figure));
    this.go(Math.min(this.frame, this.length - 1));
  }

  go(frame) {
    this.frame = ((frame % this.length) + this.length) % this.length;
    this.slider.value = this.frame;
    this.where.textContent = `frame ${this.frame} of ${this.length}`;
    this.draw();
  }

  draw() {
    const dense = this.views.find((v) => v.clip.dense);
    for (const v of this.views) {
      const shown = v.held && dense ? dense : v;
      const frame = Math.min(this.frame, shown.clip.frames - 1);
      const image = this.different && !v.held && v.away ? v.away : shown.image;
      if (image) drawFrame(v.context, image, shown.clip, frame, v.canvas.width, v.canvas.height);
      if (v.clip.psnr) v.text.textContent = `${v.clip.psnr[frame] >= 100 ? "identical" : `${v.clip.psnr[frame].toFixed(1)} dB`}`;
      if (v.spark) v.spark.move(frame);
    }
  }

  setPlaying(on) {
    this.playing = on;
    this.play.textContent = on ? "Pause" : "Play";
    this.tick();
  }

  tick() {
    if (!this.playing || !this.seen || this.ticking) return;
    this.ticking = true;
    const loop = (now) => {
      if (!this.playing || !this.seen) { this.ticking = false; return; }
      if (now - this.last >= 1000 / this.rate) {
        this.last = now;
        this.go(this.frame + 1);
      }
      requestAnimationFrame(loop);
    };
    requestAnimationFrame(loop);
  }

  key(e) {
    if (e.target.matches("select, input")) return;
    if (e.key === " " && !e.target.matches("button")) { e.preventDefault(); this.setPlaying(!this.playing); }
    const by = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (by) { e.preventDefault(); this.setPlaying(false); this.go(this.frame + by); }
  }
}

for (const root of all("[data-player]")) {
  const section = root.closest("section");
  const player = new Player(root, dataAfter(root));
  const sheets = all("[data-sheet]", section);
  const choose = (index) => sheets.forEach((s, i) => { s.hidden = i !== index; });
  const select = section.querySelector("[data-sample]");
  if (select) select.addEventListener("change", () => { choose(select.selectedIndex); player.show(select.selectedIndex); });
  choose(select ? select.selectedIndex : 0);
  if (select && select.selectedIndex > 0) player.show(select.selectedIndex);
}
