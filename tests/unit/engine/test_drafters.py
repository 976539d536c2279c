"""The drafters that need no training, on sequences without an engine."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from sterna.core.errors import DraftCacheError
from sterna.engine.drafters import suffix as suffix_module
from sterna.engine.drafters.base import Draft
from sterna.engine.drafters.ngram import NgramDrafter
from sterna.engine.drafters.store import Stored, load_outputs, save_outputs
from sterna.engine.drafters.suffix import SuffixDrafter
from sterna.engine.drafters.suffix_reference import ReferenceTree


class FakeSeq:
    """What drafters read of a Sequence."""

    def __init__(self, prompt, salt="", state=None):
        self.state = state or SimpleState(np.array(prompt, np.int32), salt)
        self.output = []


class SimpleState(SimpleNamespace):
    __hash__ = object.__hash__

    def __init__(self, prompt, salt):
        super().__init__(prompt=prompt, salt=salt)

    def __eq__(self, other):
        return self is other


def commit(seq, tokens):
    """The drafter is not told; it reads it when it is asked."""
    seq.output.extend(tokens)


def one(drafter, seq, limit=8):
    (draft,) = drafter.propose([seq], [limit])
    return draft


@pytest.fixture(params=["native", "reference"])
def tree_kind(request, monkeypatch):
    """Both trees: the fallback is held to the same behaviour."""
    if request.param == "reference":
        monkeypatch.setattr(suffix_module, "new_tree", lambda depth: ReferenceTree(depth, 2.0))
    else:
        pytest.importorskip("sterna.kernels._cpu")
    return request.param


def test_expected_accepted_tokens_sum_over_prefixes():
    assert Draft([1, 2], [0.5, 0.4], "x").expected_accepted == pytest.approx(0.5 + 0.2)


@pytest.mark.parametrize("make", [SuffixDrafter, NgramDrafter])
def test_what_followed_in_the_prompt_is_drafted(make, tree_kind):
    drafter = make()
    seq = FakeSeq([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2])
    commit(seq, [3])
    draft = one(drafter, seq, 4)
    assert draft.tokens == [4, 5, 6, 7][: len(draft.tokens)]
    assert draft.tokens
    assert len(draft.probs) == len(draft.tokens)
    assert all(0 < p < 1 for p in draft.probs)
    assert draft.source == drafter.name
    assert one(drafter, seq, 1).tokens == [4]
    assert one(drafter, seq, 0) is None


@pytest.mark.parametrize("make", [SuffixDrafter, NgramDrafter])
def test_unseen_text_gives_no_draft_and_unknown_sequences_are_ignored(make, tree_kind):
    drafter = make()
    seq = FakeSeq(range(20))
    assert one(drafter, seq) is None
    commit(seq, [50])
    drafter.finish(seq)
    drafter.finish(FakeSeq([1]))
    assert one(drafter, seq) is None


@pytest.mark.parametrize("make", [SuffixDrafter, NgramDrafter])
def test_who_was_not_asked_knows_as_much_when_it_is(make, tree_kind):
    often, late = make(), make()
    seq, same = FakeSeq([1, 2, 3, 4, 5, 6]), FakeSeq([1, 2, 3, 4, 5, 6])
    for token in (9, 1, 2):
        commit(seq, [token])
        said = one(often, seq)
    commit(same, seq.output)
    assert one(often, seq) == said == one(late, same)
    assert said.tokens[0] == 3


def test_longer_matches_are_believed_more_and_draft_longer(tree_kind):
    drafter = SuffixDrafter(min_prob=0.3)
    text = list(range(100, 140))
    short, long = FakeSeq([*text, 1, 2, 3]), FakeSeq([*text, 1, 2, 3])
    for seq, tail in ((short, text[10:12]), (long, text[4:12])):
        commit(seq, tail)
    few, many = one(drafter, short, 32), one(drafter, long, 32)
    assert few.tokens == text[12 : 12 + len(few.tokens)]
    assert len(few.tokens) < len(many.tokens)
    assert few.probs[0] < many.probs[0]


def test_outputs_of_others_are_drafted_only_within_a_tenant(tree_kind):
    drafter = SuffixDrafter()
    answer = [11, 12, 13, 14, 15, 16, 17]
    first = FakeSeq([1, 2], "a")
    commit(first, answer)
    drafter.finish(first)
    same, other = FakeSeq([3, 4], "a"), FakeSeq([3, 4], "b")
    for seq in (same, other):
        commit(seq, answer[:4])
    ours, theirs = drafter.propose([same, other], [3, 3])
    assert ours.tokens == answer[4 : 4 + len(ours.tokens)]
    assert theirs is None
    drafter.check_integrity()


def test_prompts_of_others_are_never_drafted(tree_kind):
    drafter = SuffixDrafter()
    secret = FakeSeq([21, 22, 23, 24, 25])
    commit(secret, [1])
    drafter.finish(secret)
    prying = FakeSeq([5])
    commit(prying, [21, 22, 23])
    assert one(drafter, prying) is None


def test_samples_of_a_request_see_each_other_and_its_prompt(tree_kind):
    drafter = SuffixDrafter(max_bytes=0)
    first = FakeSeq([1, 2, 3, 4, 5])
    second = FakeSeq([], state=first.state)
    commit(first, [31, 32, 33, 34])
    commit(second, [31, 32])
    assert drafter.propose([first, second], [2, 2])[1].tokens == [33, 34]
    drafter.finish(first)
    assert one(drafter, second, 2).tokens == [33, 34]
    commit(second, [2, 3])
    assert one(drafter, second, 2).tokens[0] == 4
    drafter.finish(second)
    assert drafter.num_bytes == 0


def test_past_outputs_stay_within_their_memory_oldest_first_out():
    pytest.importorskip("sterna.kernels._cpu")
    limit = 200_000
    drafter = SuffixDrafter(max_bytes=limit, max_depth=16)
    rng = random.Random(0)
    answers = [[rng.randrange(1000) for _ in range(200)] for _ in range(60)]
    for i, answer in enumerate(answers):
        seq = FakeSeq([1], f"tenant {i % 3}")
        commit(seq, answer)
        drafter.finish(seq)
        assert drafter.num_bytes <= limit
    drafter.check_integrity()
    known = []
    for i, answer in enumerate(answers):
        seq = FakeSeq(answer[:8], f"tenant {i % 3}")
        draft = one(drafter, seq, 2)
        known.append(draft is not None and draft.tokens == answer[8:10])
        drafter.finish(seq)
    assert known == sorted(known)  # forgotten, then known
    assert any(known)
    assert not all(known)


def test_an_output_too_large_for_the_memory_does_no_lasting_harm():
    pytest.importorskip("sterna.kernels._cpu")
    drafter = SuffixDrafter(max_bytes=100_000)
    for size in (20_000, 50):
        seq = FakeSeq([1])
        commit(seq, list(range(size)))
        drafter.finish(seq)
    assert drafter.num_past_tokens == 50


def test_past_outputs_survive_a_restart(tmp_path, tree_kind):
    path = tmp_path / "kept" / "drafts.bin"
    drafter = SuffixDrafter(path=path, identity="model a")
    for salt, answer in (("a", [1, 2, 3, 4, 5]), ("b", [6, 7, 8, 9]), ("a", [])):
        seq = FakeSeq([0], salt)
        commit(seq, answer)
        drafter.finish(seq)
    drafter.save()
    assert path.stat().st_mode & 0o077 == 0, "answers of users are readable by others"
    again = SuffixDrafter(path=path, identity="model a")
    assert again.num_past_tokens == 9
    seq = FakeSeq([1, 2, 3], "a")
    assert one(again, seq, 1).tokens == [4]
    other = FakeSeq([1, 2, 3], "b")
    assert one(again, other, 1) is None
    again.check_integrity()


def damage_nothing(data):
    return data


@pytest.mark.parametrize(
    ("damage", "identity", "said"),
    [
        (lambda data: data[:-1], "m", "damaged"),
        (lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:], "m", "damaged"),
        (lambda data: b"", "m", "not a file of past outputs"),
        (lambda data: b"x" * 200, "m", "not a file of past outputs"),
        (damage_nothing, "other", "another model .m; this is other."),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path, caplog, damage, identity, said):
    path = tmp_path / "drafts.bin"
    save_outputs(path, "m", [Stored(b"t" * 16, [1, 2, 3])])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DraftCacheError, match=said) as caught:
        load_outputs(path, identity)
    assert str(path) in str(caught.value)
    bad = path.read_bytes()
    drafter = SuffixDrafter(path=path, identity=identity)
    assert drafter.num_past_tokens == 0
    assert str(path) in caplog.text
    drafter.save()  # does not end what was refused
    assert path.with_name("drafts.bin.refused").read_bytes() == bad
    assert load_outputs(path, identity) == []


def test_a_folder_in_the_files_place_stays(tmp_path, caplog):
    (tmp_path / "x").write_text("mine")
    drafter = SuffixDrafter(path=tmp_path, identity="m")
    drafter.save()
    assert (tmp_path / "x").read_text() == "mine"
    assert "name a file" in caplog.text and "are not kept" in caplog.text


def test_a_save_that_fails_keeps_the_old_file(tmp_path, monkeypatch, caplog):
    path = tmp_path / "drafts.bin"
    save_outputs(path, "m", [Stored(b"t" * 16, [1, 2, 3])])
    drafter = SuffixDrafter(path=path, identity="m")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    drafter.save()
    assert "No space left" in caplog.text
    monkeypatch.undo()
    assert SuffixDrafter(path=path, identity="m").num_past_tokens == 3
    assert [p.name for p in tmp_path.iterdir()] == ["drafts.bin"]


def test_the_ngram_drafter_takes_the_longest_match_and_of_equals_the_latest():
    drafter = NgramDrafter(1, 3)
    seq = FakeSeq([1, 2, 3, 50, 9, 3, 60, 8, 3, 70, 1, 2])
    commit(seq, [3])
    assert one(drafter, seq, 1) == Draft([50], [0.75], "ngram")
    commit(seq, [99, 3])
    assert one(drafter, seq, 2).tokens == [99, 3]
    with pytest.raises(ValueError, match="min_n"):
        NgramDrafter(3, 2)
