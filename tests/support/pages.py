"""Reads the report's HTML."""

import json
import re
from html.parser import HTMLParser


class Reader(HTMLParser):
    """The tags, their attributes and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


class Page(HTMLParser):
    """The elements of a page, checked for balance; `text` without script and style."""

    VOID = "meta", "br", "img", "rect", "line", "circle", "polyline", "input", "hr"

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(html)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


class Elements(HTMLParser):
    """Elements: [tag, attributes, text of it and its children]."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        element = [tag, dict(attributes), ""]
        self.elements.append(element)
        if tag not in ("img", "input", "meta", "br"):
            self.open.append(element)

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, text):
        script = self.open and self.open[-1][0] == "script"
        for element in self.open[-1:] if script else self.open:
            element[2] += text

    def all(self, tag, **attributes):
        return [e for e in self.elements if e[0] == tag and attributes.items() <= e[1].items()]

    def texts(self, tag, **attributes):
        return [e[2] for e in self.all(tag, **attributes)]

    def rows(self):
        """The summary: {name of the row: its cells}."""
        cells = iter(self.texts("td"))
        width = len(self.texts("th"))
        rows = {}
        for name in cells:
            rows[name] = [next(cells) for _ in range(width - 1)]
        return rows


# ---------------------------------------------------------------- galleries


def index(text):
    """What the script of a gallery knows of all items."""
    [content] = re.findall('<script type="application/json" class="index">(.*?)</script>', text)
    return json.loads(content)


def blocks(text):
    """The items of each page of a gallery, the first of which is HTML; as the script reads them."""
    first = text.split("<div class=list>")[1].split("<script")[0]
    pages = [re.findall(r"<article.*?</article>", first, re.DOTALL)]
    for n, content in re.findall(r'<script type="application/json" class="block-(\d+)">(.*?)</script>', text):
        assert int(n) == len(pages)
        pages.append(json.loads(content))
    return [page for page in pages if page]


def sources(text):
    """{key: data URI} of the images that a page stores."""
    first = re.findall(r'<img data-image="(\w+)" src="([^"]*)"', text)
    others = re.findall(r'<script type="text/plain" id="image-(\w+)">(.*?)</script>', text)
    assert len(dict(first + others)) == len(first + others)  # each once
    return dict(first + others)


def images_of(text):
    """The data URIs that each item of a gallery shows, in order."""
    uris = sources(text)
    return [[uris[key] for key in re.findall(r'data-image="(\w+)"', item)] for page in blocks(text) for item in page]


def items(text):
    """[(gain or loss, HTML)] of the flipped answers in all galleries; the filter knows them, if both occur."""
    flips = []
    for part in text.split("<div class=gallery>")[1:]:
        articles = [item for page in blocks(part) for item in page]
        kinds = ["gain" if item.index("✗ wrong") < item.index("✓ right") else "loss" for item in articles]
        numbers = [["gain", "loss"].index(kind) for kind in kinds]
        assert index(part)["filters"] == ([numbers] if len({*kinds}) == 2 else [])
        flips += zip(kinds, articles)
    return flips
