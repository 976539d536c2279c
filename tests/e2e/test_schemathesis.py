"""Schemathesis over the OpenAPI document: no generated request, valid or not, gets a 5xx.

The server is live, over a tiny model, so that every sampling and structured-output field reaches
the code that uses it.
"""

from __future__ import annotations

import collections

import httpx
import live_server
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

# Random requests may ask for as many tokens as fit; the deadline bounds the test's time. The
# deadline's own status is 408, so it hides no 5xx.
SETTINGS = ("--token-budget", "64", "--threads", "1", "--kv-cache-bytes", str(8 << 20),
            "--max-model-len", "512", "--default-deadline-s", "0.2", "--max-deadline-s", "0.2",
            "--no-log-requests")  # fmt: skip
# This stream has no end; its own tests read it.
ENDLESS = "/engine/steps"


PER_ROUTE = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
ROUTES = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize",
          "/v1/models", "/v1/models/{model_id}", "/health", "/version", "/metrics",
          "/engine/state", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_model):
    running = live_server.start(tmp_path_factory.mktemp("api"), *SETTINGS, model=str(tiny_model))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def operations(server):
    """Path -> operation."""
    document = schemathesis.openapi.from_url(server.url + "/openapi.json")
    found = [result.ok() for result in document.get_all_operations()]
    return {operation.path: operation for operation in found}


def test_every_documented_route_is_tried(operations):
    assert set(operations) == {*ROUTES, ENDLESS}


# The modes: requests that fit the document, and requests that break it.
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", ROUTES)
def test_no_5xx(server, operations, path, mode):
    statuses = collections.Counter()

    def call(case):
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body.pop("model", None)  # a random name would end every request at the door
        reply = case.call(timeout=30)
        statuses[reply.status_code] += 1
        case.validate_response(reply, checks=(not_a_server_error,))

    try:
        PER_ROUTE(given(case=operations[path].as_strategy(generation_mode=mode))(call))()
    except Unsatisfiable:
        pytest.skip("nothing in this route can be wrong")
    assert statuses and max(statuses) < 500
    server.wait_idle()
    assert httpx.get(server.url + "/health").status_code == 200
    assert "Traceback" not in server.log, server.log[-3000:]
