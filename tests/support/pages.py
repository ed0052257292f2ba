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


def items(text):
    """[(kind, HTML)] of all lists that the page shows in parts."""
    blocks = re.findall(r'class="items">(.*?)</script>', text)
    return [(item["kind"], item["html"]) for block in blocks for item in json.loads(block)]
