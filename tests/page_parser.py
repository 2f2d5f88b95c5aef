"""A page as a parser sees it."""

from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br", "img", "hr", "wbr"}
SVG_LEAVES = {"line", "circle", "rect", "path", "polyline"}


Attributes = dict[str, str | None]


class Page(HTMLParser):
    """Checks that tags nest, and collects what the tests ask about."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, Attributes]] = []
        self.urls: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.scripts: list[Attributes] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag and what its attributes say."""
        found = dict(attrs)
        self.tags.append((tag, found))
        self.urls += [url for name in ("src", "href", "action", "poster", "xlink:href") if (url := found.get(name))]
        self.ids += [name] if (name := found.get("id")) else []
        if tag == "script":
            self.scripts.append(found)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag without content; only those of SVG may be written so."""
        assert tag in SVG_LEAVES, f"<{tag}/> closes nothing in HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Check that it closes what was opened last."""
        assert self.stack and self.stack[-1] == tag, f"</{tag}> inside {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        """Keep the text that people see."""
        if not self.stack or self.stack[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        """The text, each run of white space as one space."""
        return " ".join("".join(self.text).split())
