"""The pages in a real browser: no errors, no overflow on a phone's screen, and a button that copies."""

import re
import shutil
from dataclasses import replace

import pytest

from tests.unit.run_folders import CONCLUSION, make_metrics, make_samples, write_run
from tune2gguf.report import write_comparison, write_report
from tune2gguf.report.compare import Group, RankedRun
from tune2gguf.runs.curves import read_curves

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")]

PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
COMMANDS = [step.command for step in CONCLUSION.advice]

# Returns the texts whose contrast with their background is below WCAG's 4.5 : 1.
FIND_FAINT = """() => {
  const parse = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const backdrop = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) { return color; }
    }
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) { continue; }
    const style = getComputedStyle(element);
    const [a, b] = [parse(element.closest("svg") ? style.fill : style.color), backdrop(element)].map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) { faint.push(`${walker.currentNode.data.trim()}: ${ratio.toFixed(2)}`); }
  }
  return faint;
}"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        # No sandbox, which a container's root user cannot have: the page is our own.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    long_word = [replace(line, reply="x" * 2000, reference="y" * 500) for line in make_samples()]
    reasons = (*CONCLUSION.verdict.reasons, "<script>alert(1)</script>" + "z" * 500)
    conclusion = replace(CONCLUSION, verdict=replace(CONCLUSION.verdict, reasons=reasons))
    judged = write_run(folder / "judged", conclusion=conclusion, metrics=make_metrics(overfit=True), samples=long_word)
    running = write_run(folder / ("running-" + "n" * 120), metrics=make_metrics(until=50), is_finished=False)
    curves = read_curves(judged)
    costs = {"behind": None, "seconds": None, "peak_memory_bytes": None}
    compared = [
        RankedRun(
            name=f"run {number}",
            run_dir=judged,
            curves=curves,
            differences={"lora_rank": "16"},
            verdict="good fit",
            is_finished=True,
            **costs,
        )
        for number in range(6)
    ]
    groups = [Group(12, compared[:3]), Group(12, compared[3:])]
    paths = {
        "judged": write_report(judged),
        "running": write_report(running),
        "comparison": write_comparison(groups, folder / "comparison.html"),
    }
    return {name: path.as_uri() for name, path in paths.items()}


def open_page(browser, address: str, *, script: str = "", **options):
    """Return a page and the list of its errors."""
    context = browser.new_context(**options)
    context.add_init_script(script)
    page = context.new_page()
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on(
        "request", lambda request: complaints.append(request.url) if request.url not in (address, "data:,") else None
    )
    page.goto(address)
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    return page, complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", ["judged", "running", "comparison"])
def test_page_is_whole_quiet_and_legible(browser, pages, name, viewport, scheme):
    page, complaints = open_page(browser, pages[name], viewport=viewport, color_scheme=scheme)
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert page.evaluate(FIND_FAINT) == []
    size = page.evaluate("getComputedStyle(document.querySelector('.plot svg text')).fontSize")
    drawing = page.locator(".plot svg:visible").first
    scale = drawing.bounding_box()["width"] / float(re.split(" ", drawing.get_attribute("viewBox"))[2])
    assert float(size.removesuffix("px")) * scale >= 9
    page.context.close()


@pytest.mark.parametrize("number", [0, 1])
def test_button_copies_the_command_with_and_without_the_clipboard_interface(browser, pages, number):
    script = "" if number == 0 else "Object.defineProperty(navigator, 'clipboard', { value: undefined });"
    page, complaints = open_page(browser, pages["judged"], script=script, viewport=DESKTOP)
    page.locator("button.copy").nth(number).click()
    page.wait_for_function(f"document.querySelectorAll('button.copy')[{number}].textContent === 'Copied'")
    page.evaluate("document.body.append(document.createElement('textarea'))")
    page.locator("textarea").focus()
    page.keyboard.press("Control+V")
    assert page.locator("textarea").input_value() == COMMANDS[number]
    assert complaints == []
    page.context.close()


def test_command_is_there_without_scripts(browser, pages):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["judged"])
    assert page.locator(".command code").first.inner_text().replace("\n", " ") == COMMANDS[0]
    assert not page.locator("button.copy").first.is_visible()
    context.close()
