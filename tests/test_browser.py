"""JupyterLab in a real browser, where a person clicks: a training, the slider, the links.

Needs Chromium (Debian: apt-get install chromium) and playwright; skipped where either is
missing. KD_SCREENSHOTS=folder keeps the screenshots.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbconvert
import numpy as np
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))

# What a cell shows, by the notebook's own model: cells far from the screen have no page.
OUTPUTS = """() => {
  const cells = window.jupyterapp.shell.currentWidget.content.model.cells;
  const all = [];
  for (let k = 0; k < cells.length; k++) {
    const cell = cells.get(k).toJSON();
    if (cell.cell_type !== "code") continue;
    all.push({count: cell.execution_count, kinds: cell.outputs.map(o => o.output_type),
              text: cell.outputs.map(o => o.ename || o.name || "").join(),
              images: cell.outputs.filter(o => o.data && o.data["image/png"]).length});
  }
  return all;
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory, notebook_runs):
    """JupyterLab as the README starts it, on a copy: a notebook that is run saves itself."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "reference"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "kdlib.py", folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # No question about news, and no look at the package index for a newer JupyterLab.
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    environment = {
        **os.environ, "KD_DATASET": "digits", "KD_RETRAIN": "0", "KD_RUNS_DIR": str(notebook_runs),
        "JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--notebook-dir=.", "--no-browser", "--allow-root",
         f"--port={port}", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"],
        cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://localhost:{port}/lab"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(url, timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def browser():
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield chromium
        chromium.close()


@pytest.fixture
def screenshots(tmp_path):
    folder = Path(os.environ.get("KD_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    yield page
    page.close()


def open_notebook(page, lab, name):
    page.goto(f"{lab}/tree/notebooks/{name}?reset")
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.ready")


def run_all(page):
    """Run all cells from a fresh kernel, wait until the last one has ended, and see no error."""
    page.set_default_timeout(600_000)
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.set_default_timeout(60_000)
    cells = page.evaluate(OUTPUTS)
    assert [cell["count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert "error" not in cell["kinds"] and "stderr" not in cell["text"], cell
    return cells


def look(page, folder, stem):
    """A screenshot of each screenful, top to bottom."""
    area = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer"
    page.evaluate(f"() => document.querySelector('{area}').scrollTo(0, 0)")
    for k in range(40):
        page.wait_for_timeout(400)
        page.screenshot(path=folder / f"{stem}-{k:02d}.png")
        bottom = page.evaluate(f"""() => {{
            const panel = document.querySelector('{area}');
            const before = panel.scrollTop;
            panel.scrollBy(0, panel.clientHeight - 60);
            return panel.scrollTop === before;
        }}""")
        if bottom:
            break


@pytest.mark.parametrize("name", ["02_teacher.ipynb"])  # it trains, with a bar
def test_a_person_runs_the_notebook(page, lab, screenshots, name):
    open_notebook(page, lab, name)
    cells = run_all(page)
    assert sum(cell["images"] for cell in cells) >= 2
    if "KD_SCREENSHOTS" in os.environ:
        look(page, screenshots, Path(name).stem)


def test_the_slider_of_03_moves_the_picture(page, lab, screenshots):
    open_notebook(page, lab, "03_soft_labels.ipynb")
    run_all(page)
    page.evaluate("""() => {
        const notebook = window.jupyterapp.shell.currentWidget.content;
        const k = notebook.widgets.findIndex(
            cell => cell.model.sharedModel.source.includes("FloatLogSlider"));
        notebook.activeCellIndex = k;
        return notebook.scrollToItem(k, "center");
    }""")
    handle = page.locator(".widget-slider .noUi-handle, .jupyter-widgets .noUi-handle").first
    handle.scroll_into_view_if_needed()
    picture = page.locator(".jp-Cell:has(.noUi-handle) img").first
    before = picture.get_attribute("src")
    page.screenshot(path=screenshots / "slider-before.png")
    handle.focus()
    for _ in range(8):
        handle.press("ArrowRight")
    page.wait_for_timeout(3000)
    after = page.locator(".jp-Cell:has(.noUi-handle) img").first.get_attribute("src")
    page.screenshot(path=screenshots / "slider-after.png")
    assert before != after


def test_the_slider_without_a_kernel_moves_in_a_rendered_notebook(page, screenshots, tmp_path):
    rendered = tmp_path / "03.html"
    rendered.write_text(nbconvert.HTMLExporter().from_filename(
        ROOT / "notebooks" / "03_soft_labels.ipynb")[0])
    page.goto(rendered.as_uri(), wait_until="domcontentloaded")

    def shown():
        shares = page.locator("[id^=soft-] .share").all_text_contents()
        return (float(page.locator("[id^=soft-] output").text_content()),
                np.array([float(share) for share in shares]))

    slider = page.locator("[id^=soft-] input")
    slider.scroll_into_view_if_needed()
    temperature, before = shown()
    for _ in range(4):
        slider.press("ArrowRight")
    page.screenshot(path=screenshots / "slider-without-a-kernel.png")
    doubled, after = shown()
    assert (temperature, doubled) == (4, 8)
    # softmax(z / 2T) is proportional to the square root of softmax(z / T)
    np.testing.assert_allclose(after, np.sqrt(before) / np.sqrt(before).sum(), atol=0.02)
    width = page.locator("[id^=soft-] .bar").nth(int(after.argmax())).evaluate("e => e.style.width")
    assert float(width.rstrip("%")) == pytest.approx(100 * after.max(), abs=0.1)


def test_the_link_at_the_top_leads_to_the_next_notebook(page, lab):
    for here, there in (NOTEBOOKS[:2], NOTEBOOKS[-2:]):  # test_notebooks looks at all links
        open_notebook(page, lab, here)
        page.locator(f".jp-RenderedMarkdown a[href*='{there}']").first.click()
        page.wait_for_function(
            "name => window.jupyterapp.shell.currentWidget?.title.label === name", arg=there)
