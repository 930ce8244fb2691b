"""The page: well-formed HTML that needs nothing from outside, can be read aloud, and fits a phone."""

from __future__ import annotations

import base64
import csv
import io
import re
from html.parser import HTMLParser

import pytest

from moe_dist.cli.main import main
from moe_dist.errors import EXIT_OK
from tests.report.browser import browser, find

pytest.importorskip("matplotlib")

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Outline(HTMLParser):
    """Tags with their attributes, in order; fails where one is not closed in its place."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), (tag, attributes)
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(f"{self.open[-1]} {data}")

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    assert main(["inspect", str(trained), "--out", str(out)]) == EXIT_OK
    return out / "index.html"


@pytest.fixture(scope="module")
def outline(page):
    return Outline(page.read_text(encoding="utf-8"))


def test_it_is_well_formed(page, outline):
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    inner = [a["href"][1:] for a in outline.all("a") if a["href"].startswith("#")]
    assert set(inner) <= set(ids)
    assert len(inner) == 6
    assert outline.headings[0] == "h1 tiny"
    assert [h for h in outline.headings if h.startswith("h2")] == [
        "h2 Overview", "h2 Routing", "h2 Experts", "h2 Optimizer", "h2 Data and files"
    ]  # fmt: skip
    assert "<b>other" not in page.read_text(encoding="utf-8")  # a domain's name stays text


def test_it_needs_nothing_from_outside(page, outline):
    text = page.read_text(encoding="utf-8")
    assert not outline.all("script")
    for tag, attributes in outline.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes[name][:80])
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in outline.all("meta")[1]["content"]
    assert len(text) < 2_000_000


def test_it_can_be_read_aloud(outline):
    assert outline.all("html")[0]["lang"] == "en"
    pictures = outline.all("svg")
    assert len(pictures) >= 10
    assert all(picture["role"] == "img" and len(picture["aria-label"]) > 20 for picture in pictures)
    assert all("scope" in cell for cell in outline.all("th"))
    assert len(outline.all("th")) > 40
    frames = [attributes for _, attributes in outline.tags if attributes.get("class") == "scroll"]
    assert frames
    assert all(frame["tabindex"] == "0" and frame["aria-label"] for frame in frames)


def test_the_numbers_travel_with_the_page(page, outline):
    links = [a for a in outline.all("a") if "download" in a]
    assert len(links) == len(outline.all("figure")) + len(outline.all("table"))
    for link in links:
        content = base64.b64decode(link["href"].removeprefix("data:text/csv;base64,"))
        assert content == (page.parent / link["download"]).read_bytes()
        rows = list(csv.reader(io.StringIO(content.decode())))
        assert len({len(row) for row in rows}) == 1


@pytest.fixture(scope="module")
def chromium():
    if find() is None:
        pytest.skip("no Chromium on this machine")
    with browser() as started:
        yield started


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(chromium, page, width, dark):
    chromium.open(page, width=width, dark=dark)
    asked = [event["request"]["url"] for event in chromium.told("Network.requestWillBeSent")]
    assert asked[0] == page.as_uri()
    assert all(url.startswith("data:image/png;base64,") for url in asked[1:])
    for event in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed"):
        assert chromium.told(event) == []
    assert chromium.value("document.documentElement.scrollWidth") <= width
    too_wide = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('.skip')
        && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className)"""
    assert chromium.value(too_wide) == []
    # Letters of the smallest print, on the screen: figures shrink with it.
    small = """Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)
        .filter(h => h > 0))"""
    assert chromium.value(small) >= 8
    ground, ink = (chromium.value(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    assert brightness(ground) < 60 < 180 < brightness(ink) if dark else brightness(ink) < 60 < 180 < brightness(ground)
    axis = chromium.value("getComputedStyle(document.querySelector('svg text')).fill")
    assert axis == ink


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
