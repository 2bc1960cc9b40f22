"""The report page in a real browser: opened from disk, without a network, by people with different screens and needs.

Screenshots and the printed page are kept in `artifacts/` (or the folder that LLMKD_ARTIFACTS names).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llmkd.report.files import GeneratedItem
from llmkd.report.page.document import whole_page
from llmkd.report.results import Results
from tests.unit.report import example_results as example
from tests.unit.report.example_rollouts import with_rollouts

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as Tab

CHROMIUM = os.environ.get("LLMKD_CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
ARTIFACTS = Path(os.environ.get("LLMKD_ARTIFACTS") or Path(__file__).parents[2] / "artifacts")
EVIL = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).is_file(), reason="no Chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def study() -> Results:
    return with_rollouts(example.study(), EVIL)


@pytest.fixture(scope="module")
def texts(study: Results) -> list[GeneratedItem]:
    found = example.generations(study)
    found[2].outputs["reverse-s0"] = EVIL
    return found


@pytest.fixture(scope="module")
def file(study: Results, texts: list[GeneratedItem], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(whole_page(study, texts, "name: quickstart\n"), encoding="utf-8")
    return path


class Opened:
    """A tab that has the report open, and what the browser complained of."""

    def __init__(self, browser: Browser, file: Path, width: int = 1280, theme: str = "light") -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if theme == "dark" else "light",
            offline=True,
            reduced_motion="reduce",
        )
        self.tab: Tab = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url}"))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(file.as_uri())

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def keep(self, name: str, whole: bool = False) -> bytes:
        return self.tab.screenshot(path=ARTIFACTS / f"report-{name}.png", full_page=whole)

    def status(self) -> str:
        return self.tab.get_by_role("status").inner_text()

    def items(self) -> list[str]:
        return self.tab.locator("article").evaluate_all("all => all.map(one => one.innerText)")


def test_it_opens_from_disk_without_a_network_or_a_complaint(browser: Browser, file: Path) -> None:
    with Opened(browser, file) as page:
        page.tab.locator("#generations").scroll_into_view_if_needed()
        page.tab.get_by_role("button", name="Next").click()
        for summary in page.tab.locator("summary").all()[:3]:
            summary.click()
        assert page.requests == [file.as_uri()]
        assert page.complaints == []
        assert page.tab.title() == "quickstart – a distillation study"


def test_dark_and_light_differ_by_system_and_by_button(browser: Browser, file: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    bar = "getComputedStyle(document.querySelector('#intervals svg path[style*=\"--accent\"]')).stroke"
    with Opened(browser, file) as light, Opened(browser, file, theme="dark") as dark:
        pictures = light.keep("light"), dark.keep("dark")
        assert pictures[0] != pictures[1]
        seen = [(page.tab.evaluate(ground), page.tab.evaluate(bar)) for page in (light, dark)]
        assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]  # the ground and what is drawn on it
        light.tab.get_by_role("button", name="Dark theme").click()
        assert (light.tab.evaluate(ground), light.tab.evaluate(bar)) == seen[1]
        light.tab.get_by_role("button", name="Light theme").click()
        assert (light.tab.evaluate(ground), light.tab.evaluate(bar)) == seen[0]


def test_a_phone_scrolls_tables_in_their_box_and_never_the_page(browser: Browser, file: Path) -> None:
    with Opened(browser, file, width=360) as page:
        page.keep("phone")
        page.tab.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
        page.keep("phone-whole", whole=True)
        assert page.tab.evaluate("document.documentElement.scrollWidth") == 360
        box = page.tab.locator("#scores .scroll")
        assert box.evaluate("box => box.scrollWidth > box.clientWidth")
        wide = page.tab.locator("svg").evaluate_all("all => all.map(one => one.getBoundingClientRect().right)")
        assert wide and max(wide) <= 360
        smallest = page.tab.locator("svg text").evaluate_all(
            "all => Math.min(...all.map(one => parseFloat(getComputedStyle(one).fontSize) * one.getScreenCTM().a))"
        )
        assert smallest >= 7.5  # pixels


def test_charts_have_names_and_headings_are_in_order(browser: Browser, file: Path) -> None:
    with Opened(browser, file) as page:
        page.tab.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
        tree = page.tab.locator("body").aria_snapshot()
        named = re.findall(r"""- '?img "([^"]+)\"""", tree)
        assert len(named) == page.tab.locator("svg").count() > 20
        assert len(named) == len(re.findall(r"- '?img", tree))
        assert "BLEU of each strategy" in named and "Layer map of forward" in named
        for landmark in ("banner", "navigation", "main", "contentinfo"):
            assert len(re.findall(rf"^- {landmark}", tree, flags=re.M)) == 1, landmark
        levels = [int(level) for level in re.findall(r"- heading .*\[level=(\d)\]", tree)]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser: Browser, file: Path) -> None:
    with Opened(browser, file) as page:
        page.tab.keyboard.press("Tab")
        here = "document.activeElement"
        assert page.tab.evaluate(f"{here}.textContent") == "Skip to the report"
        assert page.tab.evaluate(f"{here}.getBoundingClientRect().left") >= 0
        page.tab.keyboard.press("Enter")
        page.tab.wait_for_url("**#main")  # the browser goes there after it has told us that the key is down
        seen = set()
        while True:
            page.tab.keyboard.press("Tab")
            if page.tab.evaluate(f"{here} === document.body"):  # past the last
                break
            assert page.tab.evaluate(f"getComputedStyle({here}).outlineStyle") != "none"
            seen.add(page.tab.evaluate(f"{here}.tagName + ({here}.type || {here}.className)"))
        assert {"DIVscroll", "SUMMARY", "BUTTONbutton", "Acsv"} <= seen
        page.tab.get_by_label("only where the shown models differ").focus()
        page.tab.keyboard.press("Space")
        assert "that match" in page.status()


def test_columns_sort_by_number_with_missing_last(browser: Browser, study: Results, tmp_path: Path) -> None:
    file = tmp_path / "half.html"
    file.write_text(whole_page(example.partial(study), [], ""), encoding="utf-8")
    with Opened(browser, file) as page:
        page.keep("half")
        rows = page.tab.locator("table.scores tbody tr")
        column = page.tab.locator("table.scores thead th", has_text="KL to the teacher")
        cells = [row for row in example.partial(study).rows if "agreement/kl" in row.cells]
        rising = [row.name for row in sorted(cells, key=lambda row: row.cells["agreement/kl"].mean)]
        for order, wanted in (("descending", rising[::-1]), ("ascending", rising)):
            column.get_by_role("button").click()
            names = rows.locator("th").all_inner_texts()
            assert names[: len(wanted)] == wanted
            assert set(names[len(wanted) :]) == {"teacher", "reverse", "random"}
            assert column.get_attribute("aria-sort") == order
        assert page.complaints == []


# ---------------------------------------------------------------------------------------------------------------------
# Texts side by side


def shown_by_default(study: Results) -> list[str]:
    return ["teacher", "undistilled", *(f"{row.name}-s0" for row in study.rows if row.seeds)]


def test_filters_agree_with_the_texts(browser: Browser, file: Path, study: Results, texts: list[GeneratedItem]) -> None:
    models = shown_by_default(study)
    differ = [i for i in texts if len({i.outputs[m] for m in models}) > 1]
    wrong = [i for i in texts if any(i.scores[m]["slots_exact"] == 0 for m in models)]
    find = lambda i, word: word in "\n".join([i.prompt, *i.references, *(i.outputs[m] for m in models)])  # noqa: E731
    assert 0 < len(differ) < 200 and 0 < len(wrong) < 200
    with Opened(browser, file) as page:
        assert page.status() == "Items 1 to 10 of 200"
        box = page.tab.get_by_label("only where one of them is wrong")
        box.check()
        assert page.status() == _status(len(wrong))
        box.uncheck()
        page.tab.get_by_label("only where the shown models differ").check()
        assert page.status() == _status(len(differ))
        page.tab.get_by_label("Find").fill("Selby")
        both = [i for i in differ if find(i, "Selby")]
        assert 0 < len(both) < len(differ) and page.status() == _status(len(both))
        assert [text.split("\n")[0] for text in page.items()] == [f"Item {i.item}" for i in both[:10]]
        page.keep("filtered")
        page.tab.get_by_label("Find").fill("no such word")
        assert page.status() == "No item of 200 matches." and page.items() == []
        assert page.complaints == []


def _status(count: int) -> str:
    return f"Items 1 to {min(10, count)} of {count}" + (" that match, of 200" if count < 200 else "")


def test_models_are_chosen_and_share_a_line_where_they_agree(
    browser: Browser, file: Path, texts: list[GeneratedItem]
) -> None:
    with Opened(browser, file) as page:
        names = page.tab.locator("article").first.locator("dt")
        page.tab.locator(".texts-models summary").click()
        for button, models in (("None", 0), ("All", 32), ("First of each strategy", 8)):
            page.tab.get_by_role("button", name=button, exact=True).click()
            assert page.tab.locator(".texts-models summary").inner_text() == f"Models: {models} of 32 shown"
            lines = names.all_inner_texts()[1:]
            assert len([name for line in lines for name in line.split(", ")] if models else lines) == models
        page.tab.get_by_role("button", name="None", exact=True).click()
        page.tab.get_by_label("forward-s3").check()
        page.tab.get_by_label("random-s1").check()
        same = texts[0].outputs["forward-s3"] == texts[0].outputs["random-s1"]
        assert names.all_inner_texts()[1:] == (["forward-s3, random-s1"] if same else ["forward-s3", "random-s1"])
        assert page.complaints == []


def test_differences_to_the_nearest_reference_are_marked(
    browser: Browser, file: Path, texts: list[GeneratedItem]
) -> None:
    """Without what is struck through a line is the model's text; without what is underlined it is a reference."""
    with Opened(browser, file) as page:
        for place, item in enumerate(texts[:10]):
            lines = page.tab.locator("article").nth(place).locator(".written > div:not(.reference)")
            assert lines.count()
            for line in lines.all():
                model = line.locator("dt").inner_text().split(", ")[0]
                parts = line.locator(".text").evaluate(
                    "node => [...node.childNodes].map(part => [part.nodeName, part.textContent])"
                )
                assert "".join(text for kind, text in parts if kind != "DEL") == item.outputs[model]
                if item.outputs[model] not in item.references:
                    assert "".join(text for kind, text in parts if kind != "INS") in item.references
                    assert any(kind in ("INS", "DEL") for kind, _ in parts)


def test_what_a_model_wrote_is_text(browser: Browser, file: Path) -> None:
    with Opened(browser, file) as page:
        shown = page.tab.locator("article").nth(2).locator(".written > div", has_text="reverse-s0").locator(".text")
        assert (
            shown.evaluate(
                "node => { node.querySelectorAll('del').forEach(d => d.remove()); return node.textContent; }"
            )
            == EVIL
        )
        assert page.tab.title() == "quickstart – a distillation study"
        assert page.tab.locator("img").count() == 0 and page.tab.locator("script").count() == 2
        assert page.complaints == []


def test_many_items_and_models_stay_quick(browser: Browser, file: Path) -> None:
    """Showing all models and turning the page is drawn within a second: it takes about 60 ms, at its quickest on a busy machine too."""
    with Opened(browser, file) as page:
        page.tab.locator(".texts-models summary").click()
        page.tab.get_by_role("button", name="All", exact=True).click()
        took = page.tab.evaluate(
            """() => {
              const next = [...document.querySelectorAll("#texts button")].find((b) => b.textContent === "Next");
              const times = [];
              for (let i = 0; i < 10; i++) {
                const start = performance.now();
                next.click();
                times.push(performance.now() - start);
              }
              return Math.min(...times);
            }"""
        )
        print(f"\n[page] {took:.0f} ms to show ten items of 32 models")
        assert page.status() == "Items 101 to 110 of 200"
        assert took < 1000


@pytest.mark.parametrize("width", [1280, 360])
def test_texts_written_during_training_stand_side_by_side_line_by_line(
    browser: Browser, file: Path, study: Results, width: int
) -> None:
    with Opened(browser, file, width=width) as page:
        table = page.tab.locator("#rollouts table.samples").first
        table.scroll_into_view_if_needed()
        page.keep(f"rollouts-{width}")
        boxes = [cell.bounding_box() for cell in table.locator("tbody tr").first.locator("th, td").all()]
        assert len(boxes) == 4 and all(boxes)
        tops, lefts = ([box[side] for box in boxes if box] for side in ("y", "x"))
        assert len(set(tops)) == 1 and lefts == sorted(set(lefts))
        shown = next(iter(study.rollouts.values())).shown
        assert table.locator("tbody th").first.inner_text() == shown[0].prompts[0]  # its line breaks too
        assert table.locator("tbody tr").first.locator("td").last.inner_text() == EVIL
        assert page.tab.evaluate("document.documentElement.scrollWidth") == width
        assert page.complaints == []


# ---------------------------------------------------------------------------------------------------------------------
# Print


def test_print_opens_everything_and_leaves_out_the_filters(browser: Browser, file: Path) -> None:
    with Opened(browser, file, theme="dark") as page:
        closed = page.tab.locator("main details:not([open])").count()
        pdf = page.tab.pdf(path=ARTIFACTS / "report.pdf", print_background=True, prefer_css_page_size=True)
        assert pdf.startswith(b"%PDF") and len(pdf) > 100_000
        count = "count => document.querySelectorAll('main details:not([open])').length === count"
        page.tab.wait_for_function(count, arg=closed)  # as it was before
        page.tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.tab.emulate_media(media="print")
        assert page.tab.locator("section > details:not([open]), figure details:not([open])").count() == 0
        assert page.tab.locator("figure table").first.is_visible()
        for hidden in (".texts-tools", "nav", ".theme", ".texts-pages button >> nth=0"):
            assert not page.tab.locator(hidden).is_visible()
        assert page.tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        page.keep("print")


def test_without_its_script_the_page_still_tells_all_but_the_texts(browser: Browser, file: Path) -> None:
    context = browser.new_context(java_script_enabled=False, offline=True)
    tab = context.new_page()
    tab.goto(file.as_uri())
    assert tab.locator("table.scores tbody tr").count() == 8
    assert tab.get_by_text("It takes the script of this page to show the texts").is_visible()
    context.close()
