"""The offline API's own work, on the fake model: prompts in, completions out, in order."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import sterna
from sterna.core.errors import ConfigError, RequestError, StepError
from sterna.engine import llm as llm_module
from sterna.engine import progress
from sterna.engine.llm import LLM
from sterna.engine.request import FinishReason, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def llm(harness, fake_decoder, monkeypatch):
    def build(model, config):
        return harness(fake_decoder(poison={95})).engine

    monkeypatch.setattr(llm_module, "_task", lambda model, config: "generate")
    monkeypatch.setattr(llm_module, "build_engine", build)
    return LLM("any", token_budget=64)


def test_public_names():
    assert sterna.LLM is LLM
    assert sterna.SamplingParams is SamplingParams
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = sterna.nothing_such


def test_generate_keeps_the_order_and_takes_strings_and_ids(llm, greedy):
    done = llm.generate(["!!", [5, 6], "AB"], GREEDY)
    for completion, prompt in zip(done, ([1, 1], [5, 6], [33, 34]), strict=True):
        assert completion.prompt_token_ids == tuple(prompt)
        assert list(completion.token_ids) == greedy(prompt, 6, stop_at_eos=False)
        assert completion.samples[0].finish_reason is FinishReason.LENGTH
    assert llm.generate([5, 6], GREEDY)[0].token_ids == done[1].token_ids
    assert llm.generate([], GREEDY) == []


def test_params_for_each_prompt(llm):
    each = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 4)]
    assert [len(c.token_ids) for c in llm.generate(["a", "b"], each)] == [1, 4]
    with pytest.raises(RequestError, match="3 prompts but 2 params"):
        llm.generate(["a", "b", "c"], each)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"n": True}, "n is True"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"stop": "END"}, "stop is 'END'; it has to be a list"),
        ({"bad_words": "no"}, "bad_words is 'no'"),
        ({"top_k": None, "top_p": None}, "top_p is None"),
    ],
)
def test_wrong_types_are_named_and_run_nothing(llm, fields, words):
    with pytest.raises(RequestError, match=words):
        llm.generate("a", SamplingParams(**fields))
    assert not llm.engine.has_work


def test_wrong_arguments_are_named(llm):
    with pytest.raises(RequestError, match="prompts is 5"):
        llm.generate(5, GREEDY)
    with pytest.raises(RequestError, match="SamplingParams"):
        llm.generate("a", {"max_tokens": 3})


def test_samples(llm):
    params = SamplingParams(n=3, seed=1, max_tokens=9, ignore_eos=True)
    (done,) = llm.generate("abc", params)
    assert len({sample.token_ids for sample in done.samples}) == 3


def test_one_bad_prompt_runs_nothing(llm):
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["abc", ""], GREEDY)
    assert not llm.engine.has_work


def test_a_failed_request_raises_and_leaves_nothing_behind(llm):
    with pytest.raises(StepError, match="not finite"):
        llm.generate([[1, 2], [95]], GREEDY)
    assert not llm.engine.has_work


def test_stream_equals_generate_and_closing_it_aborts(llm):
    deltas = list(llm.stream("hello", GREEDY))
    assert "".join(delta.text for delta in deltas) == llm.generate("hello", GREEDY)[0].text
    stream = llm.stream("hello", GREEDY)
    next(stream)
    stream.close()
    assert not llm.engine.has_work


def test_score_is_the_logprob_of_the_completion(llm):
    chosen = llm.generate("abc", SamplingParams(temperature=0, max_tokens=4, logprobs=0))[0]
    scored = llm.score("abc", list(chosen.token_ids))
    assert [entry.logprob for entry in scored] == [e.logprob for e in chosen.samples[0].logprobs]
    with pytest.raises(RequestError, match="at least one token"):
        llm.score("abc", "")


def test_unknown_settings_and_bad_values():
    with pytest.raises(ConfigError, match="did you mean 'token_budget'"):
        LLM("any", token_buget=3)
    with pytest.raises(ConfigError, match="block_size is 5"):
        LLM("any", block_size=5)


def test_closed(llm):
    with llm:
        pass
    llm.close()
    with pytest.raises(ConfigError, match="closed"):
        llm.generate("a", GREEDY)


def test_a_bar_appears_only_after_a_while(llm, monkeypatch):
    def shown(after_s):
        monkeypatch.setattr(progress, "SHOW_AFTER_S", after_s)
        console = Console(file=io.StringIO(), force_terminal=True, width=100)
        bar = progress.StepProgress(1, console, is_shown=True)
        h = llm.engine
        for output in llm._run(llm._requests([[1]], GREEDY), False).values():
            bar.update(output)
        bar.close()
        assert not h.has_work
        return console.file.getvalue()

    assert shown(60.0) == ""
    assert "1/1" in shown(0.0)
