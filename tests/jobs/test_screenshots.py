"""The page of a run and the browser of a table, light, dark and narrow, as Chromium shows them.

``MASKLINE_PICTURES=docs/pictures`` keeps what is seen there; those pictures of the documentation are made so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from pipeline.report import run_ids
from tests.jobs.test_segment import maskline

pytestmark = pytest.mark.slow

LOOKS: dict[str, tuple[Literal["light", "dark"], int, int]] = {
    "light": ("light", 1100, 900),
    "dark": ("dark", 1100, 900),
    "narrow": ("light", 390, 800),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nights: scenes, then as many more and a file that is no image."""
    folder = tmp_path_factory.mktemp("screenshots")
    output = folder / "results"
    for night in (1, 2):
        archive = folder / "photos" / f"night-{night}"
        maskline("draw", archive, "--num-images", 36, "--seed", night)
        if night == 2:
            (archive / "cut.jpg").write_bytes(next(archive.rglob("*.jpg")).read_bytes()[:500])
        run = maskline(
            *("segment", folder / "photos", "--output", output, "--weights", "demo", "--images-per-shard", 9),
            *("--price-per-hour", 2.5),
        )
        assert run.returncode == 0, run.stderr
    return output


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("MASKLINE_PICTURES") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def address(table: Path) -> Iterator[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "jobs", "view", str(table), "--no-browser"], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    yield server.stdout.readline().strip()
    server.terminate()
    server.wait()
    server.stdout.close()


def opened(browser: Any, look: str, address: str) -> Any:
    scheme, width, height = LOOKS[look]
    page = browser.new_page(
        color_scheme=scheme, viewport={"width": width, "height": height}, device_scale_factor=1, bypass_csp=True
    )
    page.goto(address)
    page.wait_for_load_state("networkidle")
    return page


def looks_right(page: Any, look: str) -> None:
    """Nothing sticks out, every picture is there, and the ground is light or dark as asked."""
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (sum(ground[:3]) < 200) == (look == "dark")


@pytest.mark.parametrize("look", LOOKS)
def test_the_page_of_a_run_looks_right(browser: Any, table: Path, pictures: Path, look: str) -> None:
    page = opened(browser, look, f"file://{table}/_runs/{run_ids(str(table))[-1]}.html")
    looks_right(page, look)
    page.screenshot(path=pictures / f"report-{look}.jpg", type="jpeg", quality=80)
    if look == "light":
        page.locator("figure").first.scroll_into_view_if_needed()
        page.screenshot(path=pictures / "report-samples.jpg", type="jpeg", quality=80)
    page.close()


@pytest.mark.parametrize("look", LOOKS)
def test_the_browser_of_a_table_looks_right(browser: Any, address: str, pictures: Path, look: str) -> None:
    page = opened(browser, look, f"{address}#order=most")
    page.wait_for_selector("figure img")
    page.wait_for_load_state("networkidle")
    looks_right(page, look)
    page.screenshot(path=pictures / f"view-{look}.jpg", type="jpeg", quality=80)
    page.click("figure >> nth=0")
    page.wait_for_selector("#canvas[data-drawn]")
    looks_right(page, look)
    page.screenshot(path=pictures / f"view-large-{look}.jpg", type="jpeg", quality=80)
    page.close()
