"""Parses a report page: its visible text and the data of its script."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Tags and visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def browser_data(page: Page) -> dict:
    """Returns the data that report.js reads."""
    return json.loads(re.search(r'id="group-data">(.*?)</script>', page.html)[1])
