"""The report's and the comparison's page in headless Chromium: their scripts, their look, and that they keep quiet."""

import shutil

import pytest

import browser as chromium
from adder.core.progress import Progress
from adder.core.stage_spec import Context
from adder.report import run as report
from adder.report.comparison import page as compare
from compare_fixture import sweep, write_run
from report_fixture import HOSTILE, write_stage_folders

# Every text on the page whose contrast with what lies behind it is below 4.5 (3 for large ones): WCAG 2.2, 1.4.3.
# Backgrounds are those of the nearest ancestor that has one; texts in plots have the page's.
LOW_CONTRAST = """(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, a] = parse(getComputedStyle(at).backgroundColor);
      if (a === undefined || a > 0.99) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || ["SCRIPT", "STYLE", "TITLE", "title"].includes(element.tagName)) continue;
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (element.closest(".hidden, .skip") || parseFloat(getComputedStyle(element).opacity) === 0) continue;
    const style = getComputedStyle(element);
    const colour = parse(element.closest("svg") ? style.fill : style.color).slice(0, 3);
    const [high, low] = [light(colour), light(behind(element))].sort((a, b) => b - a);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const ratio = (high + 0.05) / (low + 0.05);
    const name = `${element.tagName}.${element.getAttribute("class") ?? ""}`;
    if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)} ${name} ${text}`);
  }
  return found.slice(0, 20);
})()"""
# What stands out of the window to the right, and isn't within something that scrolls by itself.
OVERFLOW = """(() => {
  const room = document.documentElement.clientWidth; // innerWidth grows with the page on a phone, which zooms out
  const wide = document.documentElement.scrollWidth - room;
  if (wide <= 0) return [];
  const scrolls = (element) => {
    for (let at = element.parentElement; at; at = at.parentElement)
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(at).overflowX)) return true;
    return false;
  };
  return [...document.body.querySelectorAll("*")]
    .filter((e) => e.getBoundingClientRect().right > room + 1 && !scrolls(e))
    .map((e) => `${e.tagName}.${e.className}`).slice(0, 10).concat(`page: ${wide} px too wide`);
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium.find() is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with chromium.Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


def write_report(root, **options):
    settings, inputs = write_stage_folders(root / "stages", **options)
    out = root / "report"
    out.mkdir()
    report.run(settings, inputs, out, Context(Progress.silent()))
    return out / "report.html"


def write_comparison(root, runs):
    compare.run(runs, root)
    return root / "compare.html"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Both pages with everything on them that they can have, and of hostile data: {name: file}."""
    root = tmp_path_factory.mktemp("pages")
    full = {"tasks": ("gsm8k", "arc_easy", "my_tone"), "judged": True, "merge_bases": True, "price_per_hour": 2.5}
    for name in ("full", "hostile", "sweep", "strange"):
        (root / name).mkdir()
    runs = sweep(root / "sweep", 12, heldout=40)
    bad = {
        f"run {HOSTILE}".replace("/", "|"): write_run(
            root / "strange",
            "a",
            {"train.lora_r": HOSTILE, "train.epochs": 1},
            hostile=True,
            heldout=30,
            course="spiky",
        ),
        "b": write_run(root / "strange", "b", {"train.lora_r": 8, "train.epochs": 2}, right=0.5, heldout=30),
    }
    return {
        "report": write_report(root / "full", heldout=60, energy=True, **full),
        "hostile report": write_report(root / "hostile", heldout=30, hostile=True, right=0.5, course="spiky", **full),
        "comparison": write_comparison(root / "sweep", runs),
        "hostile comparison": write_comparison(root / "strange", bad),
    }


UNFOLD = "document.querySelectorAll('.fold').forEach(fold => fold.open = true)"
NAMES = ("report", "hostile report", "comparison", "hostile comparison")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_makes_no_error_and_asks_the_network_for_nothing(browser, pages, name):
    page = browser.open(pages[name])
    assert page.evaluate("document.documentElement.classList.contains('js')"), "the page's script did not run"
    assert (page.errors, page.requests, page.dialogs) == ([], [], [])
    assert pages[name].stat().st_size < 3_000_000
    page.close()


def test_the_browser_sees_errors_requests_and_dialogs(browser, tmp_path):
    """The tests above can fail: a page that does what it must not is caught."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<script>alert('hello'); console.error('wrong');"
        "fetch('http://localhost:9/x').catch(() => 0); nothing()</script>"
    )
    page = browser.open(path)
    assert page.dialogs == ["hello"] and page.requests == ["http://localhost:9/x"]
    assert "wrong" in page.errors and any("nothing is not defined" in error for error in page.errors)
    page.close()
    path.write_text(
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\"><p style='color:#777'>a</p>"
        "<p style='width: 3000px'>b</p><script>1</script>"
    )
    page = browser.open(path, 390, 800)
    assert any("Content Security Policy" in error for error in page.errors)
    page.close()
    path.write_text("<p style='color:#999'>a</p><p style='width: 3000px'>b</p>")
    page = browser.open(path, 1200, 800)
    assert page.evaluate(LOW_CONTRAST) == ["2.85 P. a"] and page.evaluate(OVERFLOW)[0] == "P."
    page.close()
    page = browser.open(path, 390, 844)
    assert page.evaluate(OVERFLOW)[0] == "P."
    page.close()


@pytest.mark.parametrize("name", ["hostile report", "hostile comparison"])
def test_what_data_say_stays_text(browser, pages, name):
    page = browser.open(pages[name])
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("document.querySelectorAll('img, iframe, object, embed, base, form[action]').length") == 0
    handlers = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).filter(n => n.startsWith('on'))"
    assert page.evaluate(handlers) == []
    assert page.evaluate("document.body.textContent.split(\"<script>alert('adder')\").length") > 8
    # Opening, ordering and searching builds the page anew from texts: they stay texts.
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    for place in range(min(4, page.evaluate("document.querySelectorAll('th button').length"))):
        page.click("th button", place)
    page.fill("input[type=search]", "<script>alert('adder')")
    assert page.evaluate("document.scripts.length") == 1 and page.dialogs == [] and page.errors == []
    page.close()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_can_be_read(browser, pages, name, dark):
    page = browser.open(pages[name], dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 300) == dark
    assert page.evaluate(LOW_CONTRAST) == []
    page.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_phone_shows_the_page_without_scrolling_sideways(browser, pages, name):
    page = browser.open(pages[name], 390, 844)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.evaluate(OVERFLOW) == []
    small = "[...document.querySelectorAll('button, select, input')].filter(e => e.checkVisibility())"
    assert page.evaluate(f"{small}.filter(e => !e.closest('th') && e.getBoundingClientRect().height < 24).length") == 0
    page.close()


# What scrolls sideways in the window: [what it is, how many gradients it has, what these move with].
SCROLLERS = """[...document.querySelectorAll(".scroll, nav ul")]
  .filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1)
  .map(e => [e.ariaLabel ?? e.tagName, getComputedStyle(e).backgroundImage.split("linear-gradient").length - 1,
             getComputedStyle(e).backgroundAttachment])"""


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_what_scrolls_sideways_on_a_phone_shows_it_at_its_edge(browser, pages, name):
    page = browser.open(pages[name], 390, 844)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    found = page.evaluate(SCROLLERS)
    wanted = {"report": {"UL", "Sources"}, "comparison": {"Runs"}}[name]
    assert wanted <= {label for label, _, _ in found}
    assert {(gradients, attached) for _, gradients, attached in found} == {(2, "local, scroll")}
    page.close()


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_the_printed_page_has_no_controls_and_fits_the_paper(browser, pages, name):
    # A4 at 96 dots an inch; the comparison's table needs the paper's long side.
    width, height = (794, 1123) if name == "report" else (1123, 794)
    page = browser.open(pages[name], width, height, media="print")
    assert page.texts("nav, .controls, .toggles") == []
    assert page.evaluate("document.querySelector('.sentence').checkVisibility()")
    assert page.evaluate(OVERFLOW) == []
    assert page.pdf().startswith(b"%PDF-")
    page.close()


def test_every_section_of_a_page_is_in_its_navigation(browser, pages):
    for name in ("report", "comparison"):
        page = browser.open(pages[name])
        linked = page.evaluate("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
        assert linked == page.evaluate("[...document.querySelectorAll('main > section')].map(e => e.id)")
        nav = "(() => { const e = document.querySelector('nav ul'); return e.scrollWidth - e.clientWidth; })()"
        assert page.evaluate(nav) <= 0, "a laptop's window has room for all of it"
        page.close()


def test_sections_fold_and_a_link_to_one_opens_it(browser, pages):
    page = browser.open(pages["report"])
    assert page.texts("#verdict .telling article") != []
    assert page.texts(".fold[open]") == [] and len(page.texts(".fold > summary")) >= 12
    page.click('nav a[href="#merge"]')
    page.evaluate("new Promise(done => setTimeout(done, 50))")
    assert page.evaluate("[...document.querySelectorAll('.fold[open]')].map(e => e.parentElement.id)") == ["merge"]
    inside = page.evaluate("document.querySelector('#merge .fold').closest('section').id")
    assert inside == "merge" and page.errors == []
    page.close()


def test_replies_are_searched_filtered_and_ordered(browser, pages):
    page = browser.open(pages["report"], height=2000)
    page.evaluate(UNFOLD)
    everything = page.evaluate("document.querySelectorAll('.sample').length")
    assert len(page.texts(".sample > summary")) == 12 < everything == 60
    assert page.texts("#sample-count") == ["12 of 60 shown"]
    page.click("#sample-more")
    assert len(page.texts(".sample > summary")) == 60
    page.choose("#sample-filter", "wrong")
    wrong = page.evaluate("document.querySelectorAll('.sample[data-tuned=\"0\"]').length")
    assert 0 < len(page.texts(".sample > summary")) == wrong < 60
    page.choose("#sample-filter", "")
    page.fill("#sample-search", "RUNNING Shoes")
    found = page.evaluate(
        "[...document.querySelectorAll('.sample:not([hidden])')].map(e => e.textContent.toLowerCase())"
    )
    assert 0 < len(found) < 60 and all("running shoes" in text for text in found)
    assert page.texts("#sample-count") == [f"{len(found)} of 60 shown"]
    page.fill("#sample-search", "there is no such word")
    assert page.texts("#no-samples") != [] and page.texts("#sample-count") == ["0 of 60 shown"]
    page.fill("#sample-search", "")
    page.choose("#sample-sort", "order")
    order = page.evaluate("[...document.querySelectorAll('.sample')].map(e => +e.dataset.order)")
    assert order == sorted(order)
    assert page.errors == []
    page.close()


def test_settings_are_filtered(browser, pages):
    page = browser.open(pages["report"])
    page.evaluate(UNFOLD)
    page.fill("#setting-search", "learning_rate")
    rows = page.texts("#setting-table tbody tr")
    assert len(rows) == 1 and "train.learning_rate" in rows[0]
    page.fill("#setting-search", "")
    page.choose("#setting-filter", "config")
    assert page.texts("#setting-table tbody td:last-child") and set(
        page.texts("#setting-table tbody td:last-child")
    ) == {"config"}
    page.close()


def test_two_runs_of_one_setting_fit_a_laptops_window(browser, tmp_path):
    runs = {
        name: write_run(tmp_path, name, {"train.learning_rate": rate}, heldout=30)
        for name, rate in (("lr-1e-4", 1e-4), ("lr-2e-4", 2e-4))
    }
    page = browser.open(write_comparison(tmp_path, runs), 1200)
    wide = "(() => { const e = document.querySelector('#runs .scroll'); return e.scrollWidth - e.clientWidth; })()"
    assert page.evaluate(wide) <= 0
    page.close()


def test_scores_stay_on_one_line_of_their_card(browser, tmp_path):
    page = browser.open(write_report(tmp_path, heldout=30, json_replies=False), 1200)
    heights = page.evaluate("[...document.querySelectorAll('.scores')].map(e => e.getBoundingClientRect().height)")
    assert "ROUGE-L" in page.texts(".card h3") and len(set(heights)) == 1
    page.close()


def test_a_table_is_ordered_by_its_headings_also_from_the_keyboard(browser, pages):
    page = browser.open(pages["comparison"])
    column = "[...document.querySelectorAll('#run-table tbody tr')].map(e => +e.cells[1].dataset.value)"
    before = page.evaluate(column)
    assert before == sorted(before, reverse=True) and len(before) == 12
    page.click("#run-table th:nth-child(2) button")
    assert page.evaluate(column) == sorted(before)
    page.evaluate("document.querySelector('#run-table th:nth-child(2) button').focus()")
    page.press("Enter")
    assert page.evaluate(column) == before
    assert page.evaluate("document.querySelector('#run-table th:nth-child(2)').ariaSort") == "descending"
    rates = "[...document.querySelectorAll('#run-table tbody tr')].map(e => +e.cells[{}].dataset.value)"
    place = page.evaluate(
        "[...document.querySelectorAll('#run-table thead th')].findIndex(e => e.textContent.includes('learning_rate'))"
    )
    page.click("#run-table th button", place - 1)  # the intervals' heading, before it, has no button
    values = page.evaluate(rates.format(place))
    assert values == sorted(values) and len(set(values)) == 12
    page.close()


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_the_keyboard_reaches_the_skip_link_first_and_focus_can_be_seen(browser, pages, name):
    page = browser.open(pages[name])
    page.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.close()


def test_runs_are_filtered_shown_and_singled_out(browser, pages):
    page = browser.open(pages["comparison"])
    page.fill("#run-search", "run-03")
    assert len(page.texts("#run-table tbody tr")) == 1 and page.texts("#run-count") == ["1 of 12 shown"]
    page.fill("#run-search", "no such run")
    assert page.texts("#no-runs") == ["No run matches."]
    page.fill("#run-search", "")
    shown = (
        "[...document.querySelectorAll('g.run')].filter(e => getComputedStyle(e).display !== 'none')"
        ".map(e => e.dataset.run)"
    )
    everything = page.evaluate(shown)
    page.click("#curves .toggle[data-toggle='0']")
    assert set(page.evaluate(shown)) == set(everything) - {"0"}
    assert page.evaluate("document.querySelector('#curves .toggle').ariaPressed") == "false"
    page.click("#curves .toggle[data-toggle='none']")
    assert page.evaluate(shown) == []
    page.click("#curves .toggle[data-toggle='all']")
    assert page.evaluate(shown) == everything
    page.hover("#run-table tbody tr:nth-child(3) th")
    assert set(page.evaluate("[...document.querySelectorAll('g.run.lit')].map(e => e.dataset.run)")) == {"2"}
    page.close()


@pytest.mark.parametrize(
    ("name", "target"),
    [("report", "#training .hit rect"), ("comparison", "#curves .hit .target"), ("comparison", "#cost .hit .target")],
)
def test_plots_show_their_figures_under_the_pointer(browser, pages, name, target):
    page = browser.open(pages[name])
    page.evaluate(UNFOLD)
    # The last one drawn: nothing lies above it.
    place = page.evaluate(f"document.querySelectorAll('{target}').length") - 1
    hit = f"document.querySelectorAll('{target}')[{place}].closest('.hit')"
    read = f"+getComputedStyle({hit}.querySelector('.read')).opacity"
    assert page.evaluate(read) == 0
    page.hover(target, place)
    assert page.evaluate(read) == 1
    assert page.evaluate(f"{hit}.querySelector('.read').textContent") == page.evaluate(
        f"{hit}.querySelector('title').textContent"
    )
    page.close()


def test_without_chromium_these_tests_are_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert chromium.find() is None
