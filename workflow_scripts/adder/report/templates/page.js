"use strict";
// What every page does before its own script: order tables, mark the section that is being read.
document.documentElement.classList.add("js");
const get = (id) => document.getElementById(id);
for (const form of document.querySelectorAll("form")) form.addEventListener("submit", (event) => event.preventDefault());

// Headings of sortable tables become buttons; numbers sort as numbers, empty cells last.
const sortValue = (cell) => {
  const text = (cell.dataset.value ?? cell.textContent).trim();
  if (text === "" || text === "–") return null;
  // A number, maybe with a unit behind it; not a name that begins with a digit.
  const found = /^[-+]?[\d.,]+(e[-+]?\d+)?(?=$|[\s%])/i.exec(text);
  return found ? parseFloat(found[0].replaceAll(",", "")) : text;
};
function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.querySelectorAll("thead th")];
  headings.forEach((heading, column) => {
    if ("noSort" in heading.dataset) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].map((row) => [sortValue(row.cells[column]), row]);
      rows.sort(([a], [b]) => (a === null) - (b === null) || (up ? 1 : -1) * compare(a, b));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}

// Mark the section that is being read.
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.classList.remove("current");
      links.get(entry.target.id)?.classList.add("current");
    }
  },
  { rootMargin: "-15% 0px -75% 0px" },
);
for (const id of links.keys()) watcher.observe(get(id));
