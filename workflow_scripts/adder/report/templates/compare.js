// Order and filter the table, show and hide runs in the plots; the page is whole without it.

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
  search.addEventListener("input", () => {
    const text = search.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(text);
    const shown = rows.filter((row) => !row.hidden).length;
    get("run-count").textContent = `${shown} of ${rows.length} shown`;
    get("no-runs").hidden = shown > 0;
  });
}
