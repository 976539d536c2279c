"""The figures of a comparison against a pass in float64, and its standard errors."""

from __future__ import annotations

import pytest
import torch

from sterna.core.errors import ConfigError
from sterna.eval.quality import compare, cut_windows, standard_error, summarise, together

VOCAB, WINDOW = 300, 200


def _scorer(seed):
    def score(window):
        g = torch.Generator().manual_seed(int(window.sum()) * 2 + seed)
        return (torch.randn(len(window) // 2, VOCAB, generator=g) * 3).log_softmax(-1)

    return score


def test_figures_are_those_of_the_definitions():
    tokens = torch.randint(0, VOCAB, (3 * WINDOW + 7,), generator=torch.Generator().manual_seed(0))
    windows = cut_windows(tokens.tolist(), WINDOW, 0, "text")
    assert windows.shape == (3, WINDOW)
    first, second = _scorer(0), _scorer(1)
    q = summarise(compare(first, second, {"text": windows})["text"])
    kls, nlls, agrees = [], [], []
    for window in windows:
        p, r = first(window).double()[:-1], second(window).double()[:-1]
        kls.append((p.exp() * (p - r)).sum(-1))
        targets = window[WINDOW // 2 + 1 :].long()
        nlls.append(torch.stack([-x[torch.arange(99), targets] for x in (p, r)]))
        agrees.append((p.argmax(-1) == r.argmax(-1)).double())
    kl, nll = torch.stack(kls), torch.stack(nlls)
    assert q.positions == 3 * 99
    assert q.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert q.kl_median == pytest.approx(float(kl.median()), rel=1e-5)
    assert q.kl_p99 == pytest.approx(float(kl.flatten().quantile(0.99)), rel=1e-5)
    assert q.kl_se == pytest.approx(float(kl.mean(1).std() / 3**0.5), rel=1e-3)
    assert q.ppl_first == pytest.approx(float(nll[:, 0].mean().exp()), rel=1e-5)
    assert q.ln_ratio == pytest.approx(float((nll[:, 1] - nll[:, 0]).mean()), rel=1e-4)
    assert q.top1 == pytest.approx(float(torch.stack(agrees).mean()))


def test_domains_together_and_progress():
    windows = {name: torch.full((2, 8), i + 1).int() for i, name in enumerate("ab")}
    seen = []
    found = compare(_scorer(0), _scorer(1), windows, lambda i, n: seen.append((i, n)))
    assert seen == [(i, 4) for i in (1, 2, 3, 4)]
    whole = summarise(together(list(found.values())))
    assert whole.positions == 2 * summarise(found["a"]).positions
    assert whole.kl == pytest.approx(sum(summarise(f).kl for f in found.values()) / 2)


def test_windows_are_cut_and_short_texts_refused():
    assert cut_windows(range(10), 3, 2, "t").tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ConfigError, match=r"text a\.txt: 2 tokens, one window of 3"):
        cut_windows([1, 2], 3, 0, "a.txt")
    assert torch.isnan(torch.tensor(standard_error(torch.ones(1, 5))))
