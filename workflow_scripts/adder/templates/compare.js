"use strict";
// Order and filter the table, show and hide runs in the plots; the page is whole without it.
document.documentElement.classList.add("js");
const get = (id) => document.getElementById(id);

// Headings of sortable tables become buttons; numbers sort as numbers, empty cells last.
const sortValue = (cell) => {
  const text = (cell.dataset.value ?? cell.textContent).trim();
  if (text === "" || text === "–") return null;
  const number = Number(text.replaceAll(",", ""));
  return Number.isNaN(number) ? text : number;
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

// The runs in the plots: buttons show and hide them, pointing at a name or a row singles one out.
const marks = [...document.querySelectorAll("g.run")];
const plots = [...document.querySelectorAll("svg.plot")];
const rows = [...document.querySelectorAll("#run-table tbody tr")];
const toggles = [...document.querySelectorAll(".toggle[aria-pressed]")];
function show(toggle, on) {
  toggle.setAttribute("aria-pressed", on);
  for (const mark of marks) if (mark.dataset.run === toggle.dataset.toggle) mark.classList.toggle("off", !on);
}
function single(run) {
  for (const plot of plots) plot.classList.toggle("one", run !== null && plot.querySelector("g.run") !== null);
  for (const mark of marks) mark.classList.toggle("lit", mark.dataset.run === run);
  for (const row of rows) row.classList.toggle("lit", row.dataset.row === run);
}
for (const toggle of toggles) {
  toggle.addEventListener("click", () => show(toggle, toggle.getAttribute("aria-pressed") === "false"));
}
for (const button of document.querySelectorAll(".toggle.all")) {
  button.addEventListener("click", () => toggles.forEach((toggle) => show(toggle, button.dataset.toggle === "all")));
}
for (const element of [...toggles, ...rows]) {
  const run = element.dataset.toggle ?? element.dataset.row;
  for (const name of ["mouseenter", "focusin"]) element.addEventListener(name, () => single(run));
  for (const name of ["mouseleave", "focusout"]) element.addEventListener(name, () => single(null));
}

const search = get("run-search");
if (search) {
  search.form.addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("input", () => {
    const text = search.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(text);
    const shown = rows.filter((row) => !row.hidden).length;
    get("run-count").textContent = `${shown} shown`;
    get("no-runs").hidden = shown > 0;
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
