// Sortable tables: a button in each header; numbers sort by data-v, rows without a number stay last.

for (const table of all("table.sortable")) {
  const body = table.tBodies[0];
  const heads = all("th[data-sort]", table);
  heads.forEach((head, column) => {
    const button = make("button", { type: "button" }, head.textContent);
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const order = now === "descending" || (now === "none" && column === 0) ? "ascending" : "descending";
      heads.forEach((h) => h.setAttribute("aria-sort", h === head ? order : "none"));
      const sign = order === "ascending" ? 1 : -1;
      const key = (row) => row.cells[column].dataset.v;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        return sign * (column === 0 ? x.localeCompare(y) : cellNumber(x) - cellNumber(y));
      });
      body.append(...rows);
    });
  });
}

function cellNumber(text) {
  return text === "inf" ? 1e300 : Number(text);
}
