// Tabs over several plots, and numbers under the pointer in heat maps.

for (const tabs of all(".tabs")) {
  const panels = all(":scope > [data-tab]", tabs);
  if (panels.length < 2) continue;
  const choose = (chosen) => panels.forEach((panel, i) => {
    panel.hidden = i !== chosen;
    buttons[i].setAttribute("aria-pressed", String(i === chosen));
  });
  const buttons = panels.map((panel, i) => make("button", { type: "button", onclick: () => choose(i) }, panel.dataset.tab));
  tabs.prepend(make("div", { class: "tablist", role: "group", "aria-label": tabs.dataset.label }, ...buttons));
  choose(0);
}

for (const figure of all(".heat[data-values]")) {
  const rows = figure.dataset.values.split(";").map((row) => row.split(","));
  const picture = figure.querySelector("svg");
  const write = (v) => {
    if (v === "") return "not recorded";
    if (figure.dataset.unit === "%") return percent(Number(v));
    return Number(v) < 1 ? `${(1000 * Number(v)).toPrecision(3)}\u00a0ms` : `${Number(v).toPrecision(3)}\u00a0s`;
  };
  picture.addEventListener("pointermove", (e) => {
    const box = picture.getBoundingClientRect();
    const layer = Math.min(rows.length - 1, Math.max(0, Math.floor(rows.length * (e.clientY - box.top) / box.height)));
    const step = Math.min(rows[0].length - 1, Math.max(0, Math.floor(rows[0].length * (e.clientX - box.left) / box.width)));
    showTip(`Layer ${layer}, step ${step}: ${write(rows[layer][step])}`, e.clientX, e.clientY);
  });
  picture.addEventListener("pointerleave", hideTip);
}
