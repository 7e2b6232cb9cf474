"""maskline view: browse a results table in the browser, its masks over the original images."""

from __future__ import annotations

import asyncio
import json
import secrets
import webbrowser
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.resources import files
from typing import Any

import tyro
from aiohttp import web

from jobs.command import run
from pipeline.errors import ConfigError, DecodeError
from pipeline.originals import Picture, read_originals
from pipeline.overlays import as_jpeg, draw_rows
from pipeline.results import open_results
from pipeline.table_index import Filter, TableIndex, opened_index

THUMBNAIL_SIDE = 320
"""Pixels of the longer side."""
PICTURE_SIDE = 2_000
THUMBNAIL_INSTANCES = 60
"""The best of an image that its thumbnail shows."""
CACHED_THUMBNAILS = 2_000
CACHED_PICTURES = 8

INDEX = web.AppKey("index", TableIndex)
TOKEN = web.AppKey("token", str)


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Look at a results table: filter by class, score, size, status, run and text, and see masks over images."""

    output: tyro.conf.Positional[str]
    """The results table's root."""
    port: int = 0
    """On this machine alone; 0 takes a free one."""
    browser: bool = True
    """Open the page; its address is printed all the same."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must lie in 0 to 65535, got {self.port}")


class Pictures:
    """Originals and thumbnails of one table, the latest kept."""

    def __init__(self, index: TableIndex) -> None:
        self._index = index
        self.original = lru_cache(CACHED_PICTURES)(_original)
        self.thumbnail = lru_cache(CACHED_THUMBNAILS)(self._thumbnail)

    def _thumbnail(self, image_key: str) -> bytes:
        pixels = self.original(image_key)
        if isinstance(pixels, DecodeError):
            raise pixels
        return as_jpeg(draw_rows(pixels, self._index.instances(image_key)[:THUMBNAIL_INSTANCES]), side=THUMBNAIL_SIDE)


def _original(image_key: str) -> Picture:
    return read_originals([image_key])[image_key]


CACHE = web.AppKey("cache", Pictures)

# ------------------------------------------------------------------------------------------------------------- server


def application(index: TableIndex, token: str) -> web.Application:
    """Every answer, the page itself too, asks for the token."""
    app = web.Application(middlewares=[_guard])
    app[INDEX], app[TOKEN], app[CACHE] = index, token, Pictures(index)
    app.add_routes(
        [
            web.get("/", _page),
            web.get("/choices", _choices),
            web.get("/images", _images),
            web.get("/thumbnail", _thumbnail),
            web.get("/picture", _picture),
            web.get("/instances", _instances),
        ]
    )
    return app


@web.middleware
async def _guard(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
    given = request.query.get("token", "")
    if not secrets.compare_digest(given.encode(), request.app[TOKEN].encode()):
        raise web.HTTPForbidden(text="the token is missing or wrong: open the address that maskline view printed")
    try:
        response = await handler(request)
    except ConfigError as error:
        raise web.HTTPBadRequest(text=str(error)) from error
    except DecodeError as error:
        raise web.HTTPNotFound(text=str(error)) from error
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


async def _page(request: web.Request) -> web.Response:
    page = files("pipeline").joinpath("pages/view.html").read_text()
    policy = (
        "default-src 'none'; img-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )
    return web.Response(text=page, content_type="text/html", headers={"Content-Security-Policy": policy})


async def _choices(request: web.Request) -> web.Response:
    index = request.app[INDEX]
    found = await asyncio.to_thread(index.choices)
    return web.json_response({**found, "output": index.results.output})


async def _images(request: web.Request) -> web.Response:
    wanted = filter_of(dict(request.query))
    start, count = (_number(request, name, default) for name, default in (("start", 0), ("count", 60)))
    return web.json_response(await asyncio.to_thread(request.app[INDEX].page, wanted, start=start, count=count))


async def _thumbnail(request: web.Request) -> web.Response:
    data = await asyncio.to_thread(request.app[CACHE].thumbnail, await _key(request))
    return web.Response(body=data, content_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


async def _picture(request: web.Request) -> web.Response:
    pixels = await asyncio.to_thread(request.app[CACHE].original, await _key(request))
    if isinstance(pixels, DecodeError):
        raise pixels
    return web.Response(body=await asyncio.to_thread(as_jpeg, pixels, side=PICTURE_SIDE), content_type="image/jpeg")


async def _instances(request: web.Request) -> web.Response:
    rows = await asyncio.to_thread(request.app[INDEX].instances, await _key(request))
    return web.json_response(rows, dumps=lambda value: json.dumps(value, default=str))


async def _key(request: web.Request) -> str:
    """Of an image that the table has."""
    key = request.query.get("key", "")
    if not await asyncio.to_thread(request.app[INDEX].has, key):
        raise ConfigError(f"the table has no image {key!r}")
    return key


def _number(request: web.Request, name: str, default: int) -> int:
    given = request.query.get(name, str(default))
    if not given.isdecimal():
        raise ConfigError(f"{name} must be a whole number, got {given!r}")
    return int(given)


def filter_of(query: dict[str, str]) -> Filter:
    """The filter that a query string asks for; empty values ask for nothing."""
    kinds = {"min_score": float, "max_score": float, "min_area": int, "max_area": int}
    values: dict[str, Any] = {}
    for field in fields(Filter):
        given = query.get(field.name, "")
        if given:
            try:
                values[field.name] = kinds.get(field.name, str)(given)
            except ValueError as error:
                raise ConfigError(f"{field.name} must be a number, got {given!r}") from error
    return Filter(**values)


def main(config: ViewConfig) -> None:
    """The command: serve the page until it is stopped."""
    results = open_results(config.output)
    with opened_index(results) as index, suppress(KeyboardInterrupt):  # its way to end
        asyncio.run(_serve(index, config))


async def _serve(index: TableIndex, config: ViewConfig) -> None:
    token = secrets.token_urlsafe(16)
    runner = web.AppRunner(application(index, token), access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", config.port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on port {config.port}: {error}; leave --port out for a free one"
            ) from error
        host, port = runner.addresses[0][:2]
        address = f"http://{host}:{port}/?token={token}"
        print(f"{address}\nCtrl-C ends it", flush=True)
        if config.browser:
            webbrowser.open(address)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    run("view", ViewConfig, main)
