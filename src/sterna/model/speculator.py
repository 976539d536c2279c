"""Speculators: small heads that draft the next n tokens from the target's last hidden state.

With h_t the target's final normed hidden state and x_t its tokens, draft i (0-based) sees

    state_0 = cell(h_t, x_(t+1))    state_i = cell(state_(i-1), x_(t+1+i))

and predicts x_(t+2+i). The cells (Arctic's MLP and summed LSTM; P projects the previous state, E is
the embedding, N an RMS norm with scale and shift, d the inner size):

    mlp     state = gelu(N(P state + a E x))
    lstm    z = P state + a [E x; E x; E x; E x];  f, i, o = sigmoid(z_0..2)
            c = c f + gelu(N_c(z_3)) i;  state = gelu(N_s(c)) o         c = 0 before the first draft

The state's share decays so that after n drafts h_t still holds half of it: w_s = 0.5^(0.5 / n),
w_e = sqrt((1 - w_s^2) d / 2), a = w_e / w_s. Weights are shared by all drafts, but for the first P,
whose input is h_t (divided by sqrt(2) rms(h_t) with `scales_input`).

`shares_base` leaves the vocabulary to the target: E x = emb_proj(its embedding of x), brought to
one length before, and the drafts' logits are its head on out_proj(state). The file then holds a
few megabytes, and an engine drafts with the head it has, quantised or not. Otherwise the
speculator has a table and a head of its own.

`draft_tokens` lists the tokens that drafts choose from (none = all): the head, which is most of a
draft's cost in a small model, is then read for these alone (FR-Spec, arXiv 2502.14856). A draft
outside of them is never right, which is what the others are paid with.

The folder of one: see speculator_file.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sterna.core.errors import ConfigError
from sterna.model.decoder import Decoder

NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class SpeculatorConfig:
    """Sizes of a speculator and of the target it is made for."""

    cell: Literal["mlp", "lstm"]
    hidden_size: int  # of the target
    vocab_size: int
    inner_size: int
    num_drafts: int = 3
    scales_input: bool = True
    shares_base: bool = True
    base_family: str = ""
    draft_tokens: tuple[int, ...] = ()  # what drafts choose from, ascending; () = the vocabulary

    def __post_init__(self) -> None:
        ids = self.draft_tokens
        is_rising = all(a < b for a, b in itertools.pairwise(ids))
        if ids and not (is_rising and ids[0] >= 0 and ids[-1] < self.vocab_size):
            raise ConfigError(
                f"draft_tokens must be ascending ids in [0, {self.vocab_size}); train a new one"
            )

    @property
    def num_outputs(self) -> int:
        """Rows of the drafts' head."""
        return len(self.draft_tokens) or self.vocab_size

    def check_base(self, base: Decoder) -> None:
        """ConfigError when `base` is not of the target's shape."""
        found = (base.config.family.name, base.config.hidden_size, base.config.vocab_size)
        wanted = (self.base_family, self.hidden_size, self.vocab_size)
        if found != wanted:
            raise ConfigError(
                "the speculator was made for (family, hidden_size, vocab_size) "
                f"{wanted}, this model has {found}; train one for it"
            )


class ShiftedNorm(nn.Module):
    """RMS norm with scale and shift, in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, d] -> [T, d]."""
        return (_unit_rms(x) * self.weight.float() + self.bias.float()).to(x.dtype)


def _unit_rms(x: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)


class Speculator(nn.Module):
    """The heads. Vocabulary tables that belong to the target are passed in, never held."""

    def __init__(self, config: SpeculatorConfig) -> None:
        super().__init__()
        self.config = config
        inner, hidden = config.inner_size, config.hidden_size
        wide = inner * (4 if config.cell == "lstm" else 1)
        self.first_proj = nn.Linear(hidden, wide, bias=False)
        self.proj = nn.Linear(inner, wide, bias=False)
        self.norm = ShiftedNorm(inner)
        self.cell_norm = ShiftedNorm(inner) if config.cell == "lstm" else None
        self.emb: nn.Embedding | None = None
        self.head: nn.Linear | None = None
        if config.shares_base:
            self.emb_proj = nn.Linear(hidden, inner, bias=False)
            self.out_proj = nn.Linear(inner, hidden, bias=False)
        else:
            self.emb = nn.Embedding(config.vocab_size, inner)
            self.head = nn.Linear(inner, config.num_outputs, bias=False)
        self.draft_ids: Tensor | None
        ids = torch.tensor(config.draft_tokens, dtype=torch.int32) if config.draft_tokens else None
        self.register_buffer("draft_ids", ids, persistent=False)
        state_share = 0.5 ** (0.5 / config.num_drafts)
        self.emb_scale = ((1 - state_share**2) * inner / 2) ** 0.5 / state_share

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal with deviation in_features^-0.5 (embeddings: inner^-0.5); norms at identity."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                size = module.weight.shape[1]
                noise = torch.randn(module.weight.shape, generator=generator) * size**-0.5
                module.weight.copy_(noise)

    def start(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The target's hidden states [T, D] -> (state before the first draft, no cell yet)."""
        if self.config.scales_input:
            hidden = (_unit_rms(hidden) * 0.5**0.5).to(hidden.dtype)
        return hidden, None

    def step(
        self, draft: int, state: Tensor, cell: Tensor | None, tokens: Tensor, base_table: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """One draft's state and cell [T, d], from the last ones and the token before [T].

        base_table [V, D]: the target's embedding; unused without `shares_base`.
        """
        z = (self.first_proj if draft == 0 else self.proj)(state)
        emb = self._embedded(tokens, base_table) * self.emb_scale
        if self.config.cell == "mlp":
            return F.gelu(self.norm(z + emb)), None
        assert self.cell_norm is not None
        f, i, o, fresh = (z + emb.repeat(1, 4)).chunk(4, dim=-1)
        added = F.gelu(self.cell_norm(fresh)) * torch.sigmoid(i)
        cell = added if cell is None else cell * torch.sigmoid(f) + added
        return F.gelu(self.norm(cell)) * torch.sigmoid(o), cell

    def _embedded(self, tokens: Tensor, base_table: Tensor) -> Tensor:
        """[T, d]; base rows are brought to rms inner^-0.5, what an own table starts with."""
        if self.emb is not None:
            own: Tensor = self.emb(tokens)
            return own
        rows = _unit_rms(base_table.index_select(0, tokens)) * self.config.inner_size**-0.5
        projected: Tensor = self.emb_proj(rows.to(self.emb_proj.weight.dtype))
        return projected

    def before_head(self, states: Tensor) -> Tensor:
        """States [T, d] -> what the head multiplies."""
        if not self.config.shares_base:
            return states
        out: Tensor = self.out_proj(states)
        return out

    def head_weight(self, base_head: Tensor) -> Tensor:
        """The drafts' head [num_outputs, .]: an own one, or the target's rows."""
        if self.head is not None:
            return self.head.weight
        return base_head if self.draft_ids is None else base_head[self.draft_ids]

    def tokens_of(self, outputs: Tensor) -> Tensor:
        """Rows of the head -> token ids."""
        return outputs if self.draft_ids is None else self.draft_ids[outputs].to(outputs.dtype)

    def outputs_of(self, tokens: Tensor, missing: int) -> Tensor:
        """Token ids -> rows of the head; `missing` for what no draft can be, negative ids too."""
        if self.draft_ids is None:
            return tokens
        at = torch.searchsorted(self.draft_ids, tokens).clamp(max=len(self.draft_ids) - 1)
        is_there = self.draft_ids[at] == tokens
        return torch.where(is_there, at.to(tokens.dtype), torch.full_like(tokens, missing))

    def states(self, hidden: Tensor, inputs: Sequence[Tensor], base_table: Tensor) -> list[Tensor]:
        """Every draft's state [T, d], given the tokens before each ([T] each)."""
        state, cell = self.start(hidden)
        found = []
        for draft, tokens in enumerate(inputs):
            state, cell = self.step(draft, state, cell, tokens, base_table)
            found.append(state)
        return found
