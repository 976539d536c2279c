"""Load against a live server: overload keeps the goodput, and memory stays flat."""

from __future__ import annotations

import asyncio
import itertools
import json
import time

import httpx
import live_server
import pytest

COMPLETIONS = "/v1/completions"
# Sixteen places and a queue of sixteen: capacity is 32 requests in the house.
PLACES = 16
REQUEST = {"prompt": "abcd" * 16, "ignore_eos": True}


async def call(server, body: dict) -> tuple[int, float, int]:
    """(status, seconds to wait before a retry, bytes); a bare client, as the CPUs are shared."""
    reader, writer = await asyncio.open_connection(*server.address)
    raw = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    try:
        answer = await reader.read()
    finally:
        writer.close()
    fields = dict(line.split(b": ", 1) for line in answer.split(b"\r\n\r\n")[0].split(b"\r\n")[1:])
    wait_s = float(fields.get(b"retry-after-ms", b"0")) / 1e3
    return int(answer[9:12]), wait_s, len(answer)


async def closed_loop(server, num_clients: int, seconds: float) -> tuple[float, int]:
    """Requests completed a second, and refused ones, with `num_clients` always asking.

    The first second, while the clients come in, does not count.
    """
    begin = time.monotonic() + 1
    end = begin + seconds
    done, refused = 0, 0
    # Lengths differ, or all would end in the same step and a window would count them in bunches.
    lengths = itertools.cycle((192, 170, 214, 181, 203))

    async def client() -> None:
        nonlocal done, refused
        while True:
            status, wait_s, _ = await call(server, {**REQUEST, "max_tokens": next(lengths)})
            counts = begin <= time.monotonic() < end
            assert status in (200, 429)
            done += counts and status == 200
            if status == 429:
                refused += 1
                assert wait_s > 0
                await asyncio.sleep(wait_s)

    clients = [asyncio.create_task(client()) for _ in range(num_clients)]
    finished, _ = await asyncio.wait(clients, timeout=seconds + 1)
    for task in clients:
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    for task in finished:
        task.result()  # a client ends only by a failure
    return done / seconds, refused


def test_overload_at_three_times_capacity_keeps_goodput(tiny):
    tiny.wait_idle()
    asyncio.run(closed_loop(tiny, PLACES, 1))  # warm
    rounds = []
    # Interleaved, because the machine is shared: each overload is judged by the peak beside it,
    # and one quiet round of six is enough to show what the server can do.
    for _ in range(6):
        peak, none_refused = asyncio.run(closed_loop(tiny, PLACES, 2.5))
        tiny.wait_idle()
        overload, refused = asyncio.run(closed_loop(tiny, 3 * 2 * PLACES, 2.5))
        tiny.wait_idle()
        assert none_refused == 0 and refused > 0
        rounds.append(overload / peak)
        if rounds[-1] >= 0.9:
            break
    assert max(rounds) >= 0.9, rounds


MIX = [
    {"prompt": "abc", "max_tokens": 20},
    {"prompt": "shared prefix " * 30, "max_tokens": 5, "n": 3},
    {"prompt": "abc", "max_tokens": 10, "logprobs": 5, "stream": True},
    {"prompt": "abc", "max_tokens": 30, "structured_outputs": {"regex": "[a-z]{5}"}},
    {"prompt": "a" * 9000, "max_tokens": 1},  # refused
    {"prompt": "abc", "max_tokens": 3000, "deadline_s": 0.05},
]


async def soak(server, seconds: float) -> int:
    """Mixed requests from eight clients; returns how many were answered."""
    end = time.monotonic() + seconds
    count = 0

    async def client(number: int) -> None:
        nonlocal count
        while time.monotonic() < end:
            status, _, _ = await call(server, MIX[(number + count) % len(MIX)])
            assert status in (200, 400, 408, 429)
            count += 1

    await asyncio.gather(*(client(number) for number in range(8)))
    return count


def check_memory_is_flat(server, num_phases: int, phase_s: float) -> None:
    """From the first to the last phase, memory may not grow by more than 8 MiB."""
    asyncio.run(soak(server, phase_s))  # arenas, caches and the ring of steps fill up
    sizes = []
    answered = 0
    for _ in range(num_phases):
        answered += asyncio.run(soak(server, phase_s))
        server.wait_idle()
        sizes.append(server.memory_bytes())
    assert answered > 10 * num_phases
    assert sizes[-1] - sizes[0] < 8 << 20, [size >> 10 for size in sizes]
    assert httpx.get(server.url + "/health").status_code == 200


def test_soak_half_a_minute_memory_is_flat(tiny):
    check_memory_is_flat(tiny, num_phases=5, phase_s=5)


@pytest.mark.slow
def test_soak_five_minutes_memory_is_flat(tmp_path, tiny_model):
    server = live_server.start(
        tmp_path, "--token-budget", "64", "--kv-cache-bytes", str(8 << 20), model=str(tiny_model)
    )
    check_memory_is_flat(server, num_phases=9, phase_s=30)
    assert server.stop() == 0
