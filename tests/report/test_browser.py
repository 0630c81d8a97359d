"""The page in Chromium: hover, sort, filter, copy, contents; no network, no error, no barrier.

`EMA_JAX_AXE` names axe-core's `axe.min.js` (`npm pack axe-core`), `EMA_JAX_CHROMIUM` the browser
where it is not on the path.
"""

import os
import shutil
from pathlib import Path

import pytest
from report_fixtures import (
    example_replication,
    example_results,
    example_sweep,
    example_trajectories,
)

from ema_jax.config import StudyConfig
from ema_jax.report import (
    drawing,
    write_replication_report,
    write_report,
    write_sweep_report,
)
from ema_jax.study import origin

pytestmark = pytest.mark.slow
NAMES = ("study", "replication", "sweep")
WIDTHS = {"desktop": 1280, "phone": 390}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    results = example_results()
    results["provenance"]["settings"] = origin.settings(StudyConfig())
    samples = [{"arm": "npo", "prompt": "p", "response": "<img src=x onerror=alert(1)>"}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "FILES", {})  # the page needs neither PNG nor PDF
        write_report(folder / "study", results, example_trajectories(), samples)
        write_replication_report(folder / "replication", example_replication())
        write_sweep_report(folder / "sweep", example_sweep())
    return {name: folder / name / "report/index.html" for name in NAMES}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("EMA_JAX_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    assert path, "no Chromium found: install it, or name it in EMA_JAX_CHROMIUM"
    with sync_playwright() as running:
        arguments = ["--no-sandbox", "--disable-gpu"]  # a runner has none: seconds a page
        yield running.chromium.launch(executable_path=path, args=arguments)


def opened(browser, path, **options):
    """A page, with everything that it asks for and complains of."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
    context.set_default_timeout(120_000)  # on a busy machine a page takes long
    page = context.new_page()
    page.asked, page.complaints = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda line: page.complaints.append(line.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("dialog", lambda dialog: page.complaints.append(dialog.message))
    page.goto(path.as_uri())
    return page


def table(page, section):
    return page.locator(f"#{section} table").last


def test_hover_sort_filter_copy_and_contents(browser, pages):
    page = opened(browser, pages["study"])
    page.locator("figure.narrow svg .tip").nth(1).hover(force=True)  # a marker; before it its bar
    assert page.locator(".tooltip").inner_text().startswith("Cybersecurity, base: 93.0 %")

    rows = table(page, "ema").locator("tbody tr")
    head = table(page, "ema").locator("thead th", has_text="Drop").first
    before = rows.all_inner_texts()
    head.get_by_role("button").click()
    drops = [float(t.split("\t")[2].replace("−", "-")) for t in rows.all_inner_texts()]
    assert drops == sorted(drops)
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").click()
    assert [float(t.split("\t")[2].replace("−", "-")) for t in rows.all_inner_texts()] == sorted(
        drops, reverse=True
    )
    head.get_by_role("button").click()
    assert rows.all_inner_texts() == before

    page.locator("#ema .tools input").fill("npo_retain")
    assert rows.count() == 6
    page.locator("#ema .tools button.copy").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    lines = copied.strip().split("\n")
    assert lines[0].startswith("Arm,Domain,Drop,95 % CI,Holm p")
    assert len(lines) == 7
    assert lines[1].startswith('npo_retain,Safety,8.2,"[2.7, 13.7]"')
    page.locator("#ema .tools input").fill("")
    assert rows.all_inner_texts() == before

    page.get_by_role("navigation", name="Contents").get_by_role("link", name="Settings").click()
    assert page.url.endswith("#settings")
    assert page.locator("#settings h2").is_visible()
    assert page.asked == [pages["study"].as_uri()]
    assert page.complaints == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_barrier_and_no_sideways_scrolling(browser, pages, name, width, scheme):
    axe = os.environ.get("EMA_JAX_AXE")
    assert axe, "name axe-core's axe.min.js in EMA_JAX_AXE"
    view = {"width": width, "height": 850}
    page = opened(browser, pages[name], viewport=view, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Through the debugger, which the page's content security policy does not bind.
    page.evaluate(Path(axe).read_text(encoding="utf-8") + ";0")
    found = page.evaluate("axe.run()")["violations"]
    assert not [(v["id"], [n["html"][:150] for n in v["nodes"][:3]]) for v in found]
    assert page.complaints == []


def test_figures_can_be_read_on_a_phone(browser, pages):
    page = opened(browser, pages["study"], viewport={"width": 390, "height": 850})
    heights = page.eval_on_selector_all(
        "figure svg text", "all => all.map(t => t.getBoundingClientRect().height)"
    )
    assert min(heights) >= 8
    first = page.locator("figure.narrow svg").bounding_box()
    assert first["width"] <= 390


def test_without_script_everything_is_there(browser, pages):
    page = opened(browser, pages["study"], java_script_enabled=False)
    assert page.locator("table").count() > 10
    assert page.locator("svg .tip > title").count() > 400
    assert page.locator(".tools").count() == 0
