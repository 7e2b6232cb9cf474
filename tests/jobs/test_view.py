"""The server as a browser meets it; the page itself in Chromium, where there is one."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from jobs.view import ViewConfig, application, filter_of
from pipeline.errors import ConfigError, DecodeError
from pipeline.results import open_results
from pipeline.table_index import Filter, opened_index
from tests.pipeline.made_up_tables import SIZE, add_run, write_images

TOKEN = "a-token"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("view") / "archive"


@pytest.fixture(scope="module")
def endpoint(archive: Path) -> Iterator[str]:
    """Of a server on a thread of its own."""
    write_images(archive, [f"{index:02d}.png" for index in range(70)] + ["gone.png", "bad.png"])
    scores: dict[str, Any] = {f"{index:02d}.png": [0.5 + index / 200] * (index % 4) for index in range(70)}
    scores |= {"gone.png": [0.99, 0.98], "bad.png": DecodeError("truncated", "<i>cut</i>")}
    output = archive.parent / "out"
    add_run(str(output), "r1", str(archive), scores)
    (archive / "gone.png").unlink()
    started: Queue[tuple[str, Callable[[], object]]] = Queue()

    async def serve(app: web.Application) -> None:
        runner, ended, loop = web.AppRunner(app), asyncio.Event(), asyncio.get_running_loop()
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        started.put((f"http://127.0.0.1:{runner.addresses[0][1]}", lambda: loop.call_soon_threadsafe(ended.set)))
        await ended.wait()
        await runner.cleanup()

    with opened_index(open_results(str(output))) as index:
        thread = threading.Thread(target=asyncio.run, args=(serve(application(index, TOKEN)),))
        thread.start()
        address, end = started.get(timeout=10)
        yield address
        end()
        thread.join(10)


def ask(endpoint: str, path: str, *, token: str = TOKEN, **values: object) -> tuple[int, bytes]:
    query = urllib.parse.urlencode({**values, "token": token})
    try:
        with urllib.request.urlopen(f"{endpoint}/{path}?{query}") as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@pytest.mark.parametrize("path", ["", "choices", "images", "thumbnail", "picture", "instances"])
def test_without_the_token_nothing_is_told(endpoint: str, path: str) -> None:
    for token in ("", "a-toke", "a-token2", "é"):
        status, body = ask(endpoint, path, token=token)
        assert status == 403
        assert b"the token is missing or wrong" in body


def test_pages_and_pictures_are_the_table_s(endpoint: str, archive: Path) -> None:
    found = json.loads(ask(endpoint, "images", order="most", count=2, status="ok", max_score=0.9)[1])
    assert found["total"] == sum(index % 4 > 0 for index in range(70))
    assert [image["num_instances"] for image in found["images"]] == [3, 3]
    key = found["images"][0]["image_key"]
    picture = np.array(Image.open(BytesIO(ask(endpoint, "picture", key=key)[1])))
    assert picture.shape == (*SIZE, 3)
    assert np.abs(picture.astype(int) - np.array(Image.open(key)).astype(int)).mean() < 6  # a JPEG of it
    thumbnail = np.array(Image.open(BytesIO(ask(endpoint, "thumbnail", key=key)[1])))
    assert np.abs(thumbnail.astype(int) - picture.astype(int)).max() > 40  # with its masks
    rows = json.loads(ask(endpoint, "instances", key=key)[1])
    assert [row["instance_index"] for row in rows] == [0, 1, 2]
    assert rows[0]["mask_rle"]


@pytest.mark.parametrize(
    ("path", "values", "status", "words"),
    [
        ("picture", {"key": "/etc/passwd"}, 400, "the table has no image '/etc/passwd'"),
        ("thumbnail", {"key": "../../x"}, 400, "has no image"),
        ("images", {"min_score": "high"}, 400, "min_score must be a number, got 'high'"),
        ("images", {"start": "-1"}, 400, "start must be a whole number"),
        ("images", {"count": "5000"}, 400, "holds 1 to 500"),
        ("images", {"order": "size"}, 400, "order must be one of"),
    ],
)
def test_bad_questions_are_answered_in_words(
    endpoint: str, path: str, values: dict[str, str], status: int, words: str
) -> None:
    found, body = ask(endpoint, path, **values)
    assert (found, words in body.decode()) == (status, True), body


def test_what_is_gone_is_not_found(endpoint: str, archive: Path) -> None:
    status, body = ask(endpoint, "picture", key=str(archive / "gone.png"))
    assert status == 404
    assert b"gone.png" in body


def test_a_query_string_is_a_filter() -> None:
    assert filter_of({"category": "disc", "min_score": "0.5", "max_area": "", "token": "x"}) == Filter(
        category="disc", min_score=0.5
    )
    with pytest.raises(ConfigError, match="port must lie in 0 to 65535, got 99999"):
        ViewConfig(output="o", port=99999)


# ------------------------------------------------------------------------------------------------------------ Chromium


@pytest.fixture
def page(browser: Any, endpoint: str) -> Iterator[Any]:
    # the page's policy forbids what Playwright waits with; the test below keeps to it
    opened = browser.new_page(viewport={"width": 1100, "height": 800}, bypass_csp=True)
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.goto(f"{endpoint}/?token={TOKEN}")
    opened.wait_for_selector("figure")
    yield opened
    opened.close()
    assert not problems


def test_the_page_works_under_its_own_policy(browser: Any, endpoint: str) -> None:
    opened = browser.new_page()
    opened.goto(f"{endpoint}/?token={TOKEN}")
    opened.wait_for_selector("figure img")
    opened.click("figure >> nth=1")
    opened.wait_for_selector("#canvas[data-drawn]")
    opened.close()


def count(page: Any) -> str:
    return str(page.inner_text("#total"))


def test_filters_change_what_is_shown_and_the_address(page: Any) -> None:
    assert count(page) == "1 to 60 of 72 images"
    page.select_option("[name=status]", "truncated")
    page.wait_for_function("document.querySelectorAll('figure').length === 1")
    assert page.inner_text("figure .none") == "truncated: <i>cut</i>"
    assert page.url.endswith("#status=truncated")
    page.click("button[type=reset]")
    page.wait_for_function("document.querySelectorAll('figure').length === 60")
    page.keyboard.press("n")
    page.wait_for_function("document.querySelectorAll('figure').length === 12")
    assert count(page) == "61 to 72 of 72 images"


def test_an_image_opens_with_its_masks_by_keys_alone(page: Any, archive: Path) -> None:
    page.select_option("[name=order]", "most")
    page.wait_for_function("location.hash.includes('order=most')")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#canvas[data-drawn='3']")
    with_masks = page.evaluate("document.getElementById('canvas').toDataURL()")
    page.keyboard.press("m")
    page.wait_for_selector("#canvas[data-drawn='0']")
    without = page.evaluate("document.getElementById('canvas').toDataURL()")
    assert with_masks != without
    page.click("#list label >> nth=1")
    page.wait_for_selector("#canvas[data-drawn='1']")
    link = page.url
    page.keyboard.press("Escape")
    assert page.is_hidden("#large")
    page.goto("about:blank")
    page.goto(link)  # the link restores the view
    page.wait_for_selector("#canvas[data-drawn='3']")
    assert page.input_value("[name=order]") == "most"


def test_masks_in_the_browser_are_pycocotools(page: Any, endpoint: str, archive: Path) -> None:
    from pycocotools import mask as coco_mask

    chance = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.5, 0.99, 1.0):
        mask = np.asfortranarray(chance.random((37, 53)) < share, np.uint8)
        row = {"mask_height": 37, "mask_width": 53, "mask_rle": coco_mask.encode(mask)["counts"].decode()}
        found = page.evaluate("row => [...decoded(row).mask]", row)
        assert np.array_equal(np.array(found).reshape(37, 53), mask)


def test_an_image_that_is_gone_says_so(page: Any, archive: Path) -> None:
    page.fill("[name=text]", "GONE")
    page.wait_for_function("document.querySelectorAll('figure').length === 1")
    page.wait_for_selector("figure .none")
    page.click("figure")
    page.wait_for_selector("#list .none")
    assert "not there any more" in page.inner_text("#list")
