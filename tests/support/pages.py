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


def items(text):
    """[(kind, HTML)] of all lists that the page shows in parts."""
    blocks = re.findall(r'class="items">(.*?)</script>', text)
    return [(item["kind"], item["html"]) for block in blocks for item in json.loads(block)]
