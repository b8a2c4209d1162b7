"""Tests report.html in headless Chromium: no errors or requests, layout, keyboard, hostile rollouts."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support.runs import group, make_full_run

from megatron_bicc.report.page import write_report

HOSTILE = (
    "</script></pre><script>window.hit = 1</script><img src=http://127.0.0.1:9/x onerror='window.hit = 2'>"
    "<svg onload='window.hit = 3'> <!-- <script> \u202e\x00\ud800 ${window.hit = 4} {{ 7 * 7 }}"
)
UNBROKEN = "x" * 3000
CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => color.slice(0, 3)
    .map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const known = new Map([[null, [255, 255, 255]]]);
  const behind = (node) => {
    if (!known.has(node)) {
      const color = rgb(getComputedStyle(node).backgroundColor);
      known.set(node, color.length === 3 || color[3] === 1 ? color : behind(node.parentElement));
    }
    return known.get(node);
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || node.closest("script, title, noscript, option") || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const color = rgb(node instanceof SVGElement ? style.fill : style.color);
    const [low, high] = [luminance(color), luminance(behind(node))].sort((a, b) => a - b);
    if ((high + 0.05) / (low + 0.05) < 4.5) poor.push(`${node.tagName} ${node.textContent.slice(0, 40)}`);
  }
  return poor;
}"""
OVERFLOW = """() => {
  const wide = document.documentElement.clientWidth;
  const scrolls = (node) => node.closest(".scroll, .list, svg");
  const out = [...document.querySelectorAll("body *")].filter(
    (node) => !scrolls(node) && node.getBoundingClientRect().right > wide + 0.5);
  return [document.documentElement.scrollWidth - wide, out.map((node) => node.outerHTML.slice(0, 80))];
}"""


@dataclass
class Watched:
    """A page and what it said and asked for."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("no Chromium; tools/setup.sh browser installs one")
    with sync_playwright() as playwright:
        # root, as in most containers, has no sandbox to offer
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: every metric, groups of every outcome, hostile and very long texts and names."""
    root = tmp_path_factory.mktemp("runs")
    bad = group(7)
    bad["prompt"] = f"hostile {HOSTILE} {UNBROKEN}"
    bad["ground_truth"] = HOSTILE
    for i, each in enumerate(bad["rollouts"]):
        each["text"], each["context"] = f"{i} {HOSTILE} {UNBROKEN}", HOSTILE
    without_contrast = [group(2, right=5, wrong=0), group(3, right=0, wrong=4)]
    groups = [group(1), *without_contrast, bad, *map(group, range(28, 36))]
    settings = {"algorithm": "bicc", "seed": 1, "bicc": {"weight": 1.0, "right_header": HOSTILE}}
    runs = [make_full_run(root / f"<b onclick=x>{UNBROKEN[:100]}", 9, groups, settings)]
    settings = {"algorithm": "grpo", "seed": 1, "bicc": {"weight": 1.0, "right_header": ""}}
    runs += [make_full_run(root / "grpo", 6, [group(50, context="")], settings)]
    return write_report(runs)


@pytest.fixture
def visit(browser: Browser, report: Path) -> Iterator[Callable[..., Watched]]:
    pages = []

    def opened(width: int = 1280, scheme: str = "light") -> Watched:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        watched = Watched(page)
        page.on("console", lambda message: watched.said.append(message.text))
        page.on("pageerror", lambda error: watched.said.append(str(error)))
        page.on("dialog", lambda dialog: (watched.said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: watched.asked.append(request.url))
        page.set_default_timeout(120_000)  # a slow machine draws slowly
        page.goto(report.as_uri())
        return watched

    yield opened
    for page in pages:
        page.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "light"), (400, "dark")])
def test_page_is_silent_alone_and_fits(visit, report: Path, width: int, scheme: str):
    watched = visit(width, scheme)
    page = watched.page
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.fill("#search", "hostile")
    expect(page.locator("#group-list > *")).to_have_count(3)
    assert page.evaluate(OVERFLOW) == [0, []]
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate("window.hit") is None
    assert page.locator("img, b, pre svg, pre script").count() == 0
    assert "window.hit = 2" in page.locator("#group pre").first.inner_text()
    assert watched.said == []
    assert watched.asked == [report.as_uri()]


def test_search_filters_and_escape(visit):
    page = visit().page
    options, detail, count = map(page.locator, ("#group-list > *", "#group", "#group-count"))
    expect(count).to_have_text("38 groups")
    page.get_by_role("searchbox", name="Search prompts").fill("PROMPT-3")
    # 3 and 30 to 35, at 3 steps
    expect(count).to_have_text("21 of 38 groups")
    assert all("prompt-3" in text for text in options.all_inner_texts())
    assert detail.locator("mark").all_inner_texts() == ["prompt-3"]
    page.get_by_role("combobox", name="Outcome").select_option("all wrong")
    expect(options).to_have_count(3)
    expect(detail).to_contain_text("4 wrong")
    expect(detail).to_contain_text("No contrast: the advantages are 0.")
    page.locator("#filter-step").select_option("9")
    expect(options).to_have_count(1)
    page.get_by_role("combobox", name="Outcome").select_option("all right")
    expect(detail).to_have_text("No group matches. Press Escape to clear the search.")
    page.get_by_role("searchbox", name="Search prompts").press("Escape")
    expect(options).to_have_count(1)
    expect(detail).to_contain_text("5 right")


def test_sides_stand_under_the_opposite_context(visit):
    page = visit().page
    page.get_by_role("searchbox", name="Search prompts").fill("prompt-30")
    right, wrong = page.locator(".side.right"), page.locator(".side.wrong")
    expect(right).to_contain_text(re.compile("2 right.*seen: wrong ones.*advantage \\+1.25", re.DOTALL))
    assert [f"wrong-30-{i}" in wrong.inner_text() for i in range(3)] == [True] * 3
    assert "wrong-30" not in right.inner_text()
    expect(wrong).to_contain_text("seen: right ones")
    page.get_by_role("combobox", name="Side").select_option("wrong")
    expect(right).to_have_count(0)
    expect(wrong).to_have_count(1)
    page.get_by_role("combobox", name="Run").select_option("grpo")
    page.get_by_role("searchbox", name="Search prompts").fill("")
    expect(wrong).to_contain_text("Trained without a context.")


def test_keyboard_alone_is_enough(visit):
    page = visit().page
    page.locator("#groups").focus()
    names = []
    for _ in range(6):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert names == ["search", "filter-run", "filter-step", "filter-outcome", "filter-side", "group-list"]
    chosen = page.locator("[role=option][aria-selected=true]")

    def chosen_after(key: str) -> int:
        page.keyboard.press(key)
        expect(chosen).to_have_count(1)
        number = chosen.get_attribute("id")
        assert number == page.locator("#group-list").get_attribute("aria-activedescendant")
        return int(number.removeprefix("group-"))

    keys = ["ArrowDown", "j", "j", "k", "ArrowUp", "End", "j", "Home", "k"]
    assert [chosen_after(key) for key in keys] == [1, 2, 3, 2, 1, 37, 37, 0, 0]
    chosen_after("End")
    inside = "(o) => { const l = o.parentElement; return o.offsetTop >= l.scrollTop - 1 && "
    inside += "o.offsetTop + o.offsetHeight <= l.scrollTop + l.clientHeight + 1; }"
    assert chosen.evaluate(inside)
    page.keyboard.press("/")
    page.keyboard.type("jk prompt")
    assert page.locator("#search").input_value() == "jk prompt"
    page.keyboard.press("Escape")
    assert page.locator("#search").input_value() == ""
    assert page.evaluate("document.activeElement.id") == "search"
    assert chosen_after("ArrowDown") == 1


def test_layout_of_another_step_can_be_chosen(visit):
    page = visit().page
    shown = page.locator("[data-layout]:visible")
    expect(shown).to_have_count(1)
    expect(shown.locator("li")).to_have_count(2)
    expect(shown).to_contain_text(
        "Rank 1, micro-batch 1: 72 of 100 rows (72%): 40 prefix, 0 right, 31 wrong, 1 padding"
    )
    first = page.locator("#layout-step option").first
    page.locator("#layout-step").select_option(first.get_attribute("value"))
    expect(shown.locator("ul")).to_have_attribute("aria-label", re.compile("step 3, with context$"))


def test_a_screen_reader_gets_names_and_headings_in_order(visit):
    page = visit().page
    levels = [
        int(tag[1])
        for tag in page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => h.tagName)")
    ]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    charts = page.locator("figure [role=img]")
    labels = [chart.get_attribute("aria-label") for chart in charts.all()]
    assert len(labels) >= 25 and all(re.search(r"from .* to |: rollout ", label) for label in labels)
    snapshot = page.locator("#groups").aria_snapshot()
    for name in ('searchbox "Search prompts"', 'combobox "Outcome"', 'listbox "Groups"', 'heading "2 right"'):
        assert name in snapshot
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))
