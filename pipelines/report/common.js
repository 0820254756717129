"use strict";
// Small tools shared by the parts of the page: building elements, reading data, colours of the current theme, tool tips.

const all = (selector, root = document) => [...root.querySelectorAll(selector)];

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// The JSON that stands right after a node in a script element.
const dataAfter = (node) => JSON.parse(node.nextElementSibling.textContent);

// A custom property as the colour it has now, in `root`'s place.
function colour(root, name) {
  const probe = make("span", { style: `color:var(${name})`, hidden: true });
  root.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

// Sprites stand once in the page, as backgrounds of CSS classes.
const sprites = new Map();
function sprite(name) {
  if (!sprites.has(name)) {
    const probe = make("i", { class: name, style: "position:absolute;width:0;height:0" });
    document.body.append(probe);
    const image = new Image();
    image.src = getComputedStyle(probe).backgroundImage.replace(/^url\(["']?|["']?\)$/g, "");
    probe.remove();
    sprites.set(name, image.decode().then(() => image));
  }
  return sprites.get(name);
}

function drawFrame(context, image, shape, frame, width, height) {
  const x = (frame % shape.columns) * shape.width, y = Math.floor(frame / shape.columns) * shape.height;
  context.imageSmoothingEnabled = false;
  context.drawImage(image, x, y, shape.width, shape.height, 0, 0, width, height);
}

const percent = (x, digits = 1) => `${(100 * x).toFixed(digits)}\u00a0%`;
const count = (n) => n.toLocaleString("en-GB");
const still = matchMedia("(prefers-reduced-motion: reduce)");

// ---- theme
const themed = [];
const onTheme = (redraw) => { themed.push(redraw); };
const systemDark = matchMedia("(prefers-color-scheme: dark)");

function setUpTheme() {
  const button = document.querySelector("[data-theme-toggle]");
  const root = document.documentElement;
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const show = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to the ${dark() ? "light" : "dark"} theme`);
    themed.forEach((redraw) => redraw());
  };
  try { root.dataset.theme = localStorage.getItem("foveal-theme") || ""; } catch { /* no storage in this context */ }
  if (!root.dataset.theme) delete root.dataset.theme;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("foveal-theme", root.dataset.theme); } catch { /* not kept, then */ }
    show();
  });
  systemDark.addEventListener("change", show);
  button.hidden = false;
  show();
}

// ---- tool tips
const tip = document.querySelector(".tip");

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(innerWidth - box.width - 6, x + 14))}px`;
  tip.style.top = `${y + box.height + 26 > innerHeight ? y - box.height - 12 : y + 18}px`;
}
const hideTip = () => { tip.hidden = true; };

function setUpTips() {
  for (const node of all("[data-tip]")) {
    const title = node.querySelector("title");
    if (title) title.remove();
    node.addEventListener("pointermove", (e) => showTip(node.dataset.tip, e.clientX, e.clientY));
    node.addEventListener("pointerleave", hideTip);
    node.addEventListener("focus", () => {
      const box = node.getBoundingClientRect();
      showTip(node.dataset.tip, box.right, box.top);
    });
    node.addEventListener("blur", hideTip);
  }
  addEventListener("keydown", (e) => { if (e.key === "Escape") hideTip(); });
  addEventListener("scroll", hideTip, { passive: true });
}
setUpTips();
