"""API keys: every route but /health, three ways in for the page, and nothing leaks."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import ValidationError

from sterna.core.errors import ConfigError
from sterna.server.auth import COOKIE, cookie_value
from sterna.server.config import ServerConfig

KEYS = ("sesame", "sch\u00f6n")


def get(connect, *calls, **settings):
    async def go():
        async with connect(api_key=KEYS, **settings) as client:
            return [await client.request(m, p, headers=h) for m, p, h in calls]

    return asyncio.run(go())


def bearer(key):
    return {"authorization": b"Bearer " + key.encode()}


def test_every_route_but_health_needs_a_key(connect):
    async def go():
        async with connect(api_key=KEYS) as client:
            paths = [route.path for route in client.app.routes]
            return {path: (await client.get(path)).status_code for path in paths}

    statuses = asyncio.run(go())
    assert statuses.pop("/health") == 200
    assert len(statuses) > 12 and set(statuses.values()) == {401}
    for path in ("/", "/docs", "/openapi.json", "/metrics", "/engine/state", "/engine/steps"):
        assert path in statuses


@pytest.mark.parametrize("path", ["/nothing", "/web/js/app.js", "//health", "/health/", "/HEALTH"])
def test_unknown_and_similar_paths_need_a_key_too(connect, path):
    (reply,) = get(connect, ("GET", path, {}))
    assert reply.status_code == 401


def test_right_and_wrong_keys(connect):
    replies = get(
        connect,
        ("GET", "/version", bearer("sesame")),
        ("GET", "/version", bearer("sch\u00f6n")),
        ("GET", "/version", bearer("sesam")),
        ("GET", "/version", {"authorization": "Basic sesame"}),
        ("GET", "/version", {"authorization": b"Bearer \xff\xfe"}),
        ("GET", "/version", {"authorization": ""}),
    )
    assert [reply.status_code for reply in replies] == [200, 200, 401, 401, 401, 401]
    wrong = replies[2]
    assert wrong.headers["www-authenticate"] == "Bearer"
    assert wrong.json()["error"]["code"] == "invalid_api_key" and "sesam" not in wrong.text
    assert wrong.headers["x-request-id"]


def test_page_takes_the_key_once_and_sets_a_cookie(connect):
    asked, wrong, opened = get(
        connect, ("GET", "/", {}), ("GET", "/?api_key=x", {}), ("GET", "/?api_key=sesame", {})
    )
    assert asked.status_code == 401 and "<form" in asked.text
    assert wrong.status_code == 401
    assert opened.status_code == 303 and opened.headers["location"] == "/"
    cookie = opened.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "sesame" not in cookie


def test_cookie_opens_every_route(connect):
    good = {"cookie": f"a=b; {COOKIE}={cookie_value('sesame')}"}
    bad = {"cookie": f"{COOKIE}=sesame"}
    inside, outside, page = get(
        connect, ("GET", "/engine/state", good), ("GET", "/engine/state", bad), ("GET", "/", good)
    )
    assert (inside.status_code, outside.status_code, page.status_code) == (200, 401, 200)


def test_query_key_opens_the_page_only(connect):
    (reply,) = get(connect, ("GET", "/metrics?api_key=sesame", {}))
    assert reply.status_code == 401


def test_key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("one\n\n two \n")
    assert ServerConfig(api_key=("zero",), api_key_file=path).keys() == ("zero", "one", "two")
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no key"):
        ServerConfig(api_key_file=path).keys()
    with pytest.raises(ConfigError, match="cannot read"):
        ServerConfig(api_key_file=tmp_path / "absent").keys()


def test_keys_are_not_shown():
    assert "sesame" not in repr(ServerConfig(api_key=("sesame",)))


@pytest.mark.parametrize("key", ["", " ", "sesame ", "\tsesame"])
def test_keys_that_would_open_or_never_match_are_refused(key):
    with pytest.raises(ValidationError, match="api_key is empty or has blanks"):
        ServerConfig(api_key=("good", key))
