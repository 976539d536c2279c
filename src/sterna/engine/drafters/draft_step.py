"""All drafts of a learned speculator as one step of kernels: recorded once, replayed by one call.

The formulae are those of model/speculator.py, the reference. Three things are done before: the
embedding's scale is multiplied into its projection (and laid out four times for the lstm), the
constants of `scales_input` and of the embedding's length are norm weights, and the drafts' head
holds the rows of `draft_tokens` only. Elsewhere than on the C++ kernels the same ops run one by
one.

Legend: S sequences, n drafts, D the target's hidden size, d the inner size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sterna.core.errors import KernelError
from sterna.core.log import get_logger
from sterna.kernels import ops
from sterna.kernels.backend import backend_for
from sterna.model.decoder import Decoder
from sterna.model.speculator import NORM_EPS, Speculator
from sterna.quant.linear import QuantModule

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DraftInputs:
    """What the drafts start from. Fixed addresses; the first S rows are in use."""

    hidden: Tensor  # [max S, D]
    tokens: Tensor  # [max S] int32, the token drawn from each hidden state


def base_rows(decoder: Decoder, ids: Tensor) -> Tensor:
    """Rows `ids` [m] int32 of the target's head, plain or packed or quantised: [m, D]."""
    head: nn.Module = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
    if isinstance(head, QuantModule):
        return ops.quant_embed(ids, *head.quant_weight.flat(), 1.0, decoder.dtype)
    weight = head.weight
    assert isinstance(weight, Tensor)
    return ops.embed(ids, weight, decoder.config.hidden_size)


class _Weights:
    """A speculator's weights in the kernels' layout, at addresses that never change."""

    def __init__(self, speculator: Speculator, decoder: Decoder) -> None:
        self._dtype = decoder.dtype
        self._packed = {name: ops.pack_weight(w) for name, w in self._plain(speculator)}
        self.norms = {name: w.clone() for name, w in self._plain_norms(speculator)}

    def __getitem__(self, name: str) -> Tensor:
        return self._packed[name]

    def load(self, speculator: Speculator) -> None:
        """Other values of the same shapes, written over these."""
        for name, weight in self._plain(speculator):
            self._packed[name].copy_(ops.pack_weight(weight))
        for name, weight in self._plain_norms(speculator):
            self.norms[name].copy_(weight)

    def _plain(self, s: Speculator) -> list[tuple[str, Tensor]]:
        copies = 4 if s.config.cell == "lstm" else 1
        found: list[tuple[str, Tensor]] = [
            ("first_proj", s.first_proj.weight),
            ("proj", s.proj.weight),
        ]
        if s.config.shares_base:
            scaled = s.emb_proj.weight.float() * s.emb_scale
            found += [("emb", scaled.repeat(copies, 1)), ("out_proj", s.out_proj.weight)]
        else:
            assert s.head is not None
            unit = torch.eye(s.config.inner_size, device=s.proj.weight.device)
            found += [("emb", unit.repeat(copies, 1)), ("head", s.head.weight)]
        return [(name, w.detach().to(self._dtype).contiguous()) for name, w in found]

    def _plain_norms(self, s: Speculator) -> list[tuple[str, Tensor]]:
        found: list[tuple[str, Tensor]] = [("norm", s.norm.weight), ("norm_bias", s.norm.bias)]
        if s.cell_norm is not None:
            found += [("cell_norm", s.cell_norm.weight), ("cell_norm_bias", s.cell_norm.bias)]
        if s.emb is not None:
            found.append(("table", s.emb.weight))
        return [(name, w.detach().to(self._dtype)) for name, w in found]


class DraftStep:
    """The draft loop of one speculator beside one decoder, for up to `max_seqs` sequences.

    `decoder` is prepared for inference; ConfigError when the speculator was made for another.
    """

    def __init__(
        self, speculator: Speculator, decoder: Decoder, max_seqs: int, replay: bool = True
    ) -> None:
        config = speculator.config
        config.check_base(decoder)
        self.config = config
        self._decoder = decoder
        self._emb_scale = speculator.emb_scale
        device, hidden = decoder.device, config.hidden_size
        self.inputs = DraftInputs(
            torch.zeros(max_seqs, hidden, dtype=decoder.dtype, device=device),
            torch.zeros(max_seqs, dtype=torch.int32, device=device),
        )
        ids = speculator.draft_ids
        self._ids = None if ids is None else ids.to(device=device, dtype=torch.int32)
        with torch.inference_mode():
            self._weights = _Weights(speculator, decoder)
            self._head = None
            if self._ids is not None and config.shares_base:
                self._head = ops.pack_weight(base_rows(decoder, self._ids))
            self._state_gain = torch.full((hidden,), 0.5**0.5, dtype=torch.float32, device=device)
            self._emb_gain = torch.full((hidden,), config.inner_size**-0.5, device=device)
            self._state_gain = self._state_gain.to(decoder.dtype)
            self._emb_gain = self._emb_gain.to(decoder.dtype)
        self._kept: list[Tensor] = []
        self._replay = self._record(max_seqs) if replay else None

    @torch.inference_mode()
    def run(self, num_seqs: int) -> tuple[Tensor, Tensor]:
        """Tokens int32 and probabilities float32, [n, S] each, of the first rows of `inputs`."""
        if self._replay is not None:
            self._replay(num_seqs)
            picks = self._picks
        else:
            part = DraftInputs(self.inputs.hidden[:num_seqs], self.inputs.tokens[:num_seqs])
            picks = self.forward(part)
            self._kept.clear()
        tokens = torch.stack([pick[0, :num_seqs] for pick in picks])
        return tokens, torch.stack([pick[1, :num_seqs] for pick in picks]).view(torch.float32)

    @torch.inference_mode()
    def load(self, speculator: Speculator) -> None:
        """Draft with other weights from now on."""
        self._weights.load(speculator)

    def forward(self, inputs: DraftInputs) -> list[Tensor]:
        """Each draft's `ops.pick`."""
        state, cell = inputs.hidden, None
        if self.config.scales_input:
            state = self._keep(ops.rms_norm(state, self._state_gain, NORM_EPS))
        picks: list[Tensor] = []
        tokens = inputs.tokens
        for draft in range(self.config.num_drafts):
            state, cell = self._cell("proj" if draft else "first_proj", state, cell, tokens)
            picks.append(self._keep(ops.pick(self._logits(state), self._ids)))
            tokens = picks[-1][0]
        return picks

    def _keep(self, x: Tensor) -> Tensor:
        """A recording reuses the memory of tensors that have died; views do not count."""
        self._kept.append(x)
        return x

    def _cell(
        self, proj: str, state: Tensor, cell: Tensor | None, tokens: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        is_lstm = self.config.cell == "lstm"
        wide = self.config.inner_size * (4 if is_lstm else 1)
        emb = ops.linear(self._embedded(tokens), self._weights["emb"], None, None, wide)
        z = ops.linear(state, self._weights[proj], None, emb, wide)
        norms = self._weights.norms
        out = self._keep(
            ops.draft_cell(
                z, cell, norms["norm"], norms["norm_bias"], norms.get("cell_norm"),
                norms.get("cell_norm_bias"), NORM_EPS,
            )
        )  # fmt: skip
        rows = len(z)
        return (out[:rows], out[rows:]) if is_lstm else (out, None)

    def _embedded(self, tokens: Tensor) -> Tensor:
        if not self.config.shares_base:
            table = self._weights.norms["table"]
            return ops.embed(tokens, table, self.config.inner_size, self._emb_scale)
        base: Tensor = self._decoder.embed_tokens(tokens)
        return ops.rms_norm(base, self._emb_gain, NORM_EPS)

    def _logits(self, state: Tensor) -> Tensor:
        count = self.config.num_outputs
        if not self.config.shares_base:
            return ops.logits(state, self._weights["head"], count)
        out = ops.linear(state, self._weights["out_proj"], None, None, self.config.hidden_size)
        if self._head is None:
            return self._decoder.logits(out)
        return ops.logits(out, self._head, count, self._decoder.config.logits_softcap)

    def _record(self, max_seqs: int) -> Callable[[int], None] | None:
        """The loop on a tape, or None where only its single ops run."""
        if self._decoder.device.type != "cpu" or backend_for("cpu").name != "cpu":
            return None
        from sterna.kernels.cpu_backend import CpuBackend
        from sterna.kernels.tape import StepTape

        def first_pick(inputs: DraftInputs) -> Tensor:
            self._picks = self.forward(inputs)
            return self._picks[0]

        backend = backend_for("cpu")
        assert isinstance(backend, CpuBackend)
        try:
            rows = (self.inputs.hidden, self.inputs.tokens)
            tape = StepTape(backend, first_pick, self.inputs, rows, ())
        except KernelError as error:
            log.info("drafts are interpreted, not replayed: %s", error)
            self._kept.clear()
            return None
        return lambda num_seqs: tape.replay(num_seqs, 0, 0)
