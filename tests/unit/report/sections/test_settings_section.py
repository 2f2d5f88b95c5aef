"""Every setting on the page, with where its value came from."""

from page_parser import Page


def test_every_setting_has_its_value_and_origin(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = Page(text[text.index('<section id="settings"') : text.index('<section id="provenance"')])
    origins = [attrs["data-origin"] for tag, attrs in page.tags if tag == "tr" and "data-origin" in attrs]
    assert set(origins) == {"chosen", "run", "config", "default"}
    assert "train.learning_rate0.0001run" in page.words and f"{len(origins)} of {len(origins)} shown" in page.words
    # What was chosen leads to its reason.
    assert "#choice-lengths.max_seq_length" in page.urls
