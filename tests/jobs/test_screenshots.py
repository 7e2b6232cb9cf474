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

from pipeline import storage, uris
from pipeline.report import run_ids
from tests.jobs.test_segment import maskline
from tests.pipeline.s3_server import running_server

pytestmark = pytest.mark.slow

LOOKS: dict[str, tuple[Literal["light", "dark"], int, int]] = {
    "light": ("light", 1100, 900),
    "dark": ("dark", 1100, 900),
    "narrow": ("light", 390, 800),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two nights, in a store: scenes, then as many more and a file that is no image."""
    with pytest.MonkeyPatch.context() as patch, running_server() as server:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", server)
        uris.forget_clients()
        store = uris.resolve("s3://photographs")[0]
        for bucket in ("photographs", "results"):
            store.mkdir(bucket)
        for night in (26, 27):
            drawn = tmp_path_factory.mktemp("night") / "scenes"
            maskline("draw", drawn, "--num-images", 36, "--seed", night)
            for file in drawn.rglob("*.jpg"):
                storage.write_bytes(f"s3://photographs/2026-11-{night}/{file.name}", file.read_bytes())
            if night == 27:
                storage.write_bytes("s3://photographs/2026-11-27/cut.jpg", file.read_bytes()[:500])
            run = maskline(
                *("segment", "s3://photographs/", "--output", "s3://results/scenes", "--weights", "demo"),
                *("--images-per-shard", 9, "--price-per-hour", 2.5),
            )
            assert run.returncode == 0, run.stderr
        yield "s3://results/scenes"
        uris.forget_clients()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("MASKLINE_PICTURES") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def address(table: str) -> Iterator[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "jobs", "view", table, "--no-browser"], stdout=subprocess.PIPE, text=True
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
    seen = "[...document.images].filter(image => image.src && image.getBoundingClientRect().top < window.innerHeight)"
    page.wait_for_function(f"{seen}.every(image => image.complete && image.naturalWidth > 0)", timeout=20_000)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (sum(ground[:3]) < 200) == (look == "dark")


@pytest.mark.parametrize("look", LOOKS)
def test_the_page_of_a_run_looks_right(browser: Any, table: str, pictures: Path, tmp_path: Path, look: str) -> None:
    (tmp_path / "run.html").write_bytes(storage.read_bytes(f"{table}/_runs/{run_ids(table)[-1]}.html"))
    page = opened(browser, look, f"file://{tmp_path}/run.html")
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
    if look == "dark":
        page.screenshot(path=pictures / "view-large-dark.jpg", type="jpeg", quality=80)
    page.close()
