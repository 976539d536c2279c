"""Stop strings are found wherever the token borders fall, and never shown in part."""

from __future__ import annotations

import random

import pytest

from sterna.engine.request import FinishReason, SamplingParams
from sterna.engine.stopping import StopChecker

EOS = 0


class Pieces:
    """Tokens are indices into a list of byte pieces; UTF-8 is held back like the real one does."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.buffer = b""

    def push(self, ids):
        self.buffer += b"".join(self.pieces[i] for i in ids)
        for cut in range(len(self.buffer), max(-1, len(self.buffer) - 4), -1):
            try:
                text = self.buffer[:cut].decode()
            except UnicodeDecodeError:
                continue
            self.buffer = self.buffer[cut:]
            return text
        return ""

    def flush(self):
        text, self.buffer = self.buffer.decode("utf-8", "replace"), b""
        return text


def run(pieces, max_output=10_000, **params):
    """Feed the pieces; returns (shown text per token, last Progress)."""
    checker = StopChecker(
        SamplingParams(**params), Pieces([b"", *pieces]), frozenset({EOS}), max_output
    )
    shown = []
    for token in range(1, len(pieces) + 1):
        progress = checker.push(token)
        shown.append(progress.text)
        if progress.finish_reason is not None:
            return shown, progress
    progress = checker.push(EOS)
    return [*shown, progress.text], progress


def cut(text, rng):
    """The UTF-8 bytes of `text` in random pieces of 1 to 4 bytes."""
    data, pieces = text.encode(), []
    while data:
        size = rng.randint(1, 4)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


@pytest.mark.parametrize(
    "stop", [("END",), ("\u00e4\u00f6",), ("ab", "abc"), ("aab",), ("\U0001f600!",)]
)
def test_any_cutting_gives_the_same_text(stop):
    rng = random.Random(1)
    for _ in range(300):
        body = "".join(rng.choices("aEN\u00e4\u00f6b \U0001f600", k=rng.randint(0, 12)))
        has_stop = rng.random() < 0.7
        text = body + (rng.choice(stop) + "tail" if has_stop else "")
        hits = [text.find(s) for s in stop if s in text]
        shown, last = run(cut(text, rng), stop=stop)
        if hits:
            assert "".join(shown) == text[: min(hits)]
            assert last.stop_reason in stop
        else:
            assert "".join(shown) == text
            assert last.stop_reason is None
        assert last.finish_reason is FinishReason.STOP


def test_text_that_may_begin_a_stop_string_is_held_back():
    shown, _ = run([b"ab", b"E", b"N", b"x", b"EN", b"D..."], stop=("END",))
    assert shown == ["ab", "", "", "ENx", "", ""]


def test_included_stop_string():
    shown, last = run([b"ab", b"EN", b"Dx"], stop=("END",), include_stop_str_in_output=True)
    assert "".join(shown) == "abEND"
    assert last.stop_reason == "END"


def test_held_text_is_released_at_the_end():
    shown, last = run([b"ab", b"EN"], stop=("END",))
    assert "".join(shown) == "abEN"
    assert last.finish_reason is FinishReason.STOP
    shown, last = run([b"ab", b"EN"], max_output=2, stop=("END",))
    assert "".join(shown) == "abEN"
    assert last.finish_reason is FinishReason.LENGTH


def test_incomplete_utf8_is_released_as_replacement():
    shown, last = run(["\u00e4".encode()[:1]], max_output=1)
    assert shown == ["\ufffd"]
    assert last.finish_reason is FinishReason.LENGTH


def test_stop_tokens_are_not_text():
    shown, last = run([b"ab", b"cd", b"ef"], stop_token_ids=(2,))
    assert "".join(shown) == "ab"
    assert last.stop_reason == 2
    shown, _ = run([b"ab", b"cd"], stop_token_ids=(2,), include_stop_str_in_output=True)
    assert "".join(shown) == "abcd"


def test_ignore_eos_keeps_going_and_stop_ids_still_work():
    params = SamplingParams(ignore_eos=True, stop_token_ids=(1,))
    checker = StopChecker(params, Pieces([b"<eos>", b"x"]), frozenset({EOS}), 99)
    assert checker.push(EOS).finish_reason is None
    assert checker.push(1).finish_reason is FinishReason.STOP
    assert checker.end_ids == (1,)


def test_before_min_tokens_nothing_stops():
    shown, last = run([b"END", b"END", b"a", b"END"], stop=("END",), min_tokens=2)
    assert "".join(shown) == "ENDENDa"
    assert last.stop_reason == "END"
