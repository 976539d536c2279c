"""GPTQ and AWQ checkpoints of Hugging Face folders, run on native tiles or read as plain weights.

AutoGPTQ packs 32 / bits codes of neighbouring inputs into an int32 [in / 8, out], AutoAWQ those of
neighbouring outputs [in, out / 8] in the order 0 2 4 6 1 3 5 7; both have zero points packed
along outputs and float16 scales [groups, out]. A weight is (code - zero) * scale, and AutoGPTQ
stores zero - 1 unless its `checkpoint_format` is "gptq_v2".

Natively, so without any loss:

    4 bits, every zero 8 (symmetric)   int4, same groups and scales
    4 bits, other zeros (asymmetric)   int5, same groups and scales: code - zero lies in -16..15
    8 bits, every zero 128             int8

What has no native form (act-order with groups, groups other than 32, 64, 128 or a whole row,
asymmetric 8 bits) is dequantised and rounded to int8 in groups of 32, a relative error near 0.4 %.
`form` says which; 2 and 3 bits are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sterna.core.errors import UnsupportedModelError
from sterna.kernels.quant_weight import QuantWeight
from sterna.model.hf_weights import SafetensorsSource
from sterna.quant.formats import ELEMENTS, GROUP_SIZES, WeightFormat, parse_format
from sterna.quant.rtn import Rows, pack_rows, quantize_weight

METHODS = ("gptq", "awq")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_WITHOUT_NATIVE_FORM = "int8-g32"


@dataclass(frozen=True, slots=True)
class PackedForm:
    """What packed weights become. is_native: the same numbers, else they are rounded anew."""

    format: WeightFormat
    is_native: bool


class PackedSource:
    """A GPTQ or AWQ folder as a TensorSource: `read` dequantises packed weights.

    Raises UnsupportedModelError for widths other than 4 and 8 bits and for AWQ's other layouts.
    """

    def __init__(self, inner: SafetensorsSource, config: Mapping[str, Any]) -> None:
        self.label = inner.label
        self._inner = inner
        self._method = str(config.get("quant_method"))
        self._bits = int(config.get("bits", config.get("w_bit", 4)))
        is_v2 = config.get("checkpoint_format") == "gptq_v2"
        self._zero_offset = 1 if self._method == "gptq" and not is_v2 else 0
        version = str(config.get("version", "gemm")).lower()
        if self._bits not in (4, 8) or (self._method == "awq" and version != "gemm"):
            raise UnsupportedModelError(
                f"{self.label}: {self._method} with {self._bits} bits ({version}); supported: "
                "gptq with 4 or 8 bits, awq with 4 bits in the gemm layout"
            )

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """See TensorSource."""
        base = name.removesuffix(".weight")
        if not self.is_packed(base):
            return self._inner.read(name, dtype)
        codes, scales = self._codes(base), self._scales(base)
        return (codes.float() * scales[:, self._groups(base)]).to(dtype)

    def is_packed(self, base: str) -> bool:
        """Whether weight `base`.weight is stored packed."""
        return self._inner.has(f"{base}.qweight")

    def form(self, bases: tuple[str, ...]) -> PackedForm:
        """What the stacked weights become (see the module's text). All must be packed."""
        groups = {self._group_size(base) for base in bases}
        size = groups.pop()
        zero = 1 << (self._bits - 1)
        is_symmetric = all(bool((self._zeros(base) == zero).all()) for base in bases)
        if groups or size not in (0, *GROUP_SIZES) or (self._bits == 8 and not is_symmetric):
            return PackedForm(parse_format(_WITHOUT_NATIVE_FORM), False)
        element = f"int{self._bits}" if is_symmetric else "int5"
        suffix = f"-g{size}" if size else ""
        fmt = WeightFormat(element + suffix, (ELEMENTS[element],), size, "float16")
        return PackedForm(fmt, True)

    def weight(self, bases: tuple[str, ...], is_gated: bool) -> QuantWeight:
        """The stacked weights as tiles, in `form(bases)`."""
        form = self.form(bases)
        fmt = form.format
        if not form.is_native:
            plain = torch.cat([self.read(f"{base}.weight", torch.float32) for base in bases])
            return quantize_weight(plain, fmt, is_gated=is_gated, name=bases[0])
        mask = (1 << fmt.bits) - 1
        codes = torch.cat([self._codes(base) for base in bases]).to(torch.uint8) & mask
        scales = torch.cat([self._scales(base) for base in bases]).half()
        return pack_rows(Rows(codes, scales, None), fmt, is_gated)

    def _codes(self, base: str) -> Tensor:
        """code - zero, int16 [out, in]."""
        packed = self._inner.stored(f"{base}.qweight")
        if self._method == "awq":
            q = self._unpacked_columns(packed).t()
        else:
            q = self._unpacked(packed.t())
        zeros = self._zeros(base).t()[:, self._groups(base)]
        return (q.short() - zeros.short()).contiguous()

    def _zeros(self, base: str) -> Tensor:
        """int32 [groups, out]."""
        return self._unpacked_columns(self._inner.stored(f"{base}.qzeros")) + self._zero_offset

    def _scales(self, base: str) -> Tensor:
        """float32 [out, groups]."""
        return self._inner.read(f"{base}.scales", torch.float32).t().contiguous()

    def _groups(self, base: str) -> Tensor:
        """The group of each input, int64 [in]."""
        if self._method == "gptq" and self._inner.has(f"{base}.g_idx"):
            return self._inner.stored(f"{base}.g_idx").long()
        return self._plain_groups(base)

    def _plain_groups(self, base: str) -> Tensor:
        num_inputs, num_groups = self._sizes(base)
        return torch.arange(num_inputs) // -(-num_inputs // num_groups)

    def _sizes(self, base: str) -> tuple[int, int]:
        rows = self._inner.stored(f"{base}.qweight").shape[0]
        per_word = 1 if self._method == "awq" else 32 // self._bits
        return rows * per_word, self._inner.stored(f"{base}.scales").shape[0]

    def _group_size(self, base: str) -> int:
        """Neighbouring inputs that share a scale; 0 = all, -1 = they are not neighbours."""
        num_inputs, num_groups = self._sizes(base)
        if num_groups == 1:
            return 0
        is_plain = torch.equal(self._groups(base), self._plain_groups(base))
        return -(-num_inputs // num_groups) if is_plain else -1

    def _unpacked(self, packed: Tensor) -> Tensor:
        """int32 [n, words] -> int32 [n, words * 32 / bits], low bits first."""
        shifts = torch.arange(0, 32, self._bits, dtype=torch.int32)
        return ((packed[:, :, None] >> shifts) & ((1 << self._bits) - 1)).flatten(1)

    def _unpacked_columns(self, packed: Tensor) -> Tensor:
        """`_unpacked` of columns, in AWQ's order where it applies."""
        plain = self._unpacked(packed)
        if self._method != "awq":
            return plain
        order = torch.argsort(torch.tensor(_AWQ_ORDER))
        return plain.view(packed.shape[0], -1, 8)[:, :, order].flatten(1)
