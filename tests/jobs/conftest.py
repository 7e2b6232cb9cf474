"""A network that costs next to nothing, and a real browser, where there is one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

import model
from model.recipe import Recipe

CHROMIUM = shutil.which("chromium") or os.environ.get("MASKLINE_CHROMIUM", "")

FEW_PROPOSALS = Recipe(rpn_post_nms=100)
"""For tests of what is around a network."""


def small_network(categories: dict[int, str] | None = None) -> model.MaskRCNN:
    config = model.R18_half_FPN(num_classes=6, min_size=96, max_size=160)
    return model.random_network(config, seed=0, recipe=FEW_PROPOSALS, categories=categories)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if not CHROMIUM:
        pytest.skip("needs Chromium on the path, or named by MASKLINE_CHROMIUM")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield opened
        opened.close()
