// Folding, search, filter and order; the page is whole without it.

// All sections but the first fold under their headings, so that a reader chooses; a link to one opens it.
for (const section of document.querySelectorAll("main > section:not(:first-child)")) {
  const fold = document.createElement("details");
  const summary = document.createElement("summary");
  fold.className = "fold";
  summary.append(section.querySelector("h2"));
  fold.append(summary, ...section.childNodes);
  section.append(fold);
}
function unfold() {
  const target = location.hash.length > 1 && get(location.hash.slice(1));
  if (!target) return;
  const fold = target.querySelector(":scope > .fold") ?? target.closest(".fold");
  if (fold) fold.open = true;
  target.scrollIntoView();
}
addEventListener("hashchange", unfold);
// Also where the link names the place that the page is at already.
for (const link of document.querySelectorAll('a[href^="#"]')) link.addEventListener("click", () => setTimeout(unfold));
unfold();

// Show the elements that `keep` accepts and say how many they are.
function filterTo(elements, keep, count) {
  let shown = 0;
  for (const element of elements) {
    element.hidden = !keep(element);
    shown += !element.hidden;
  }
  count.textContent = `${shown} of ${elements.length} shown`;
  return shown;
}

const samples = [...document.querySelectorAll(".sample")];
const sampleTexts = new Map(samples.map((sample) => [sample, sample.textContent.toLowerCase()]));
const groups = {
  wrong: ({ tuned }) => tuned === "0",
  right: ({ tuned }) => tuned === "1",
  gained: ({ base, tuned }) => base === "0" && tuned === "1",
  lost: ({ base, tuned }) => base === "1" && tuned === "0",
};
const FIRST = 12;
let showAll = false;
// Without a search or a filter only the first dozen stand open to view, so that the page stays short.
function filterSamples() {
  const text = get("sample-search").value.trim().toLowerCase();
  const group = groups[get("sample-filter").value];
  let place = 0;
  const keep = (sample) => {
    if (!text && !group) return showAll || place++ < FIRST;
    return (!group || group(sample.dataset)) && sampleTexts.get(sample).includes(text);
  };
  const shown = filterTo(samples, keep, get("sample-count"));
  get("no-samples").hidden = shown > 0;
  get("sample-more").hidden = showAll || Boolean(text || group) || shown === samples.length;
  get("sample-more").textContent = `Show all ${samples.length}`;
}
function sortSamples() {
  const by = get("sample-sort").value;
  const sign = by === "gain" ? -1 : 1;
  samples.sort((a, b) => sign * (a.dataset[by] - b.dataset[by]));
  get("samples").append(...samples);
  filterSamples();
}
if (samples.length) {
  get("sample-search").addEventListener("input", filterSamples);
  get("sample-filter").addEventListener("change", filterSamples);
  get("sample-sort").addEventListener("change", sortSamples);
  get("sample-more").addEventListener("click", () => {
    showAll = true;
    const next = samples[FIRST];
    filterSamples();
    next.querySelector("summary").focus();
  });
  filterSamples();
}

const settings = [...document.querySelectorAll("#setting-table tbody tr")];
function filterSettings() {
  const text = get("setting-search").value.trim().toLowerCase();
  const origin = get("setting-filter").value;
  const keep = (row) => (!origin || row.dataset.origin === origin) && row.textContent.toLowerCase().includes(text);
  filterTo(settings, keep, get("setting-count"));
}
get("setting-search").addEventListener("input", filterSettings);
get("setting-filter").addEventListener("change", filterSettings);
