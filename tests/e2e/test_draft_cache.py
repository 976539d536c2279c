"""Past outputs over restarts of `sterna serve`: written at SIGTERM, read at the next start, put
aside when they are of another model.
"""

from __future__ import annotations

import httpx
import live_server

QUICK = ("--token-budget", "64", "--threads", "1", "--kv-cache-bytes", str(8 << 20))
BODY = {"prompt": "abcabc", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


def serve_once(folder, model, kept):
    """Start, answer one request, end by SIGTERM: the answer and the log."""
    arguments = (*QUICK, "--speculation", "suffix", "--draft-cache", str(kept))
    server = live_server.start(folder, *arguments, model=str(model))
    reply = httpx.post(server.url + "/v1/completions", json=BODY, timeout=60).raise_for_status()
    assert server.stop() == 0
    return reply.json()["choices"][0]["text"], server.log


def test_sigterm_keeps_outputs_and_the_next_start_knows_them(tmp_path):
    model = live_server.write_tiny_model(tmp_path / "model")
    kept = tmp_path / "kept.bin"
    first, log = serve_once(tmp_path, model, kept)
    assert "past outputs" not in log
    again, log = serve_once(tmp_path, model.rename(tmp_path / "moved"), kept)
    assert again == first
    assert f"1 past outputs, 60 tokens, from {kept}" in log
    of_both = kept.read_bytes()
    weights = tmp_path / "moved" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # one bit of one weight
    weights.write_bytes(data)
    _, log = serve_once(tmp_path, tmp_path / "moved", kept)
    assert "another model" in log and "starting without past outputs" in log
    assert (tmp_path / "kept.bin.refused").read_bytes() == of_both
    assert len(kept.read_bytes()) < len(of_both)
