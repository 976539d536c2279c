"""The HTTP client under every way a response can be cut into packets."""

from __future__ import annotations

import asyncio

import pytest

from sterna.cli.bench_serve.wire import Wire, WireError, WirePool

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"d\r\ndata: one\n\nda\r\n"
    b"9\r\nta: two\n\n\r\n"
    b"0\r\n\r\n"
)
PLAIN = b"HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\n\r\nnope!"
UNTIL_CLOSE = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: x\n\n"


class Outbox(asyncio.Transport):
    def __init__(self):
        super().__init__()
        self.sent = b""

    def write(self, data):
        self.sent += bytes(data)

    def abort(self):
        pass


async def _exchange(response, step, closes=False):
    wire = Wire(clock=lambda: 1.0)
    wire.connection_made(Outbox())
    waiting = asyncio.ensure_future(wire.exchange(b"GET /"))
    await asyncio.sleep(0)
    for start in range(0, len(response), step):
        wire.data_received(response[start : start + step])
    if closes:
        wire.connection_lost(None)
    return await waiting, wire


@pytest.mark.parametrize("step", [1, 2, 3, 7, 50, 10_000])
def test_chunked_streams_in_any_packets(step):
    reply, wire = asyncio.run(_exchange(CHUNKED, step))
    assert reply.status == 200
    assert [payload for _, payload in reply.events] == [b"one", b"two"]
    assert wire.is_usable


@pytest.mark.parametrize("step", [1, 4, 10_000])
def test_plain_bodies(step):
    reply, _ = asyncio.run(_exchange(PLAIN, step))
    assert (reply.status, bytes(reply.body)) == (404, b"nope!")


def test_a_body_may_end_with_the_connection():
    reply, wire = asyncio.run(_exchange(UNTIL_CLOSE, 5, closes=True))
    assert [payload for _, payload in reply.events] == [b"x"]
    assert not wire.is_usable


@pytest.mark.parametrize("cut", [10, len(CHUNKED) - 20, len(CHUNKED) - 3])
def test_a_cut_off_response_is_an_error(cut):
    with pytest.raises(WireError, match="connection lost"):
        asyncio.run(_exchange(CHUNKED[:cut], 50, closes=True))


def test_noise_is_no_response():
    with pytest.raises(WireError, match="no HTTP"):
        asyncio.run(_exchange(b"hello\r\n\r\n", 100))


def test_idle_connections_are_reused_and_replaced_when_closed():
    num_connections = 0

    async def serve(reader, writer):
        nonlocal num_connections
        num_connections += 1
        for _ in range(2):  # the third request on a connection finds it closed
            await reader.readuntil(b"\r\n\r\n")
            writer.write(PLAIN)
        writer.close()

    async def go():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        pool = WirePool(f"http://127.0.0.1:{port}/base", {"X-A": "b"})
        request = pool.request("GET", "/path")
        assert request.startswith(b"GET /base/path HTTP/1.1\r\n")
        assert b"X-A: b\r\n" in request
        replies = [await pool.exchange(request) for _ in range(5)]
        pool.close()
        server.close()
        return replies

    replies = asyncio.run(go())
    assert [reply.status for reply in replies] == [404] * 5
    assert num_connections == 3
