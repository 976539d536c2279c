"""The weights of rollouts that do not read the trainer's own: merged, or rounded to a format."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sterna.core.errors import ConfigError
from sterna.model.decoder import Decoder
from sterna.model.layers import GatedLinear, Linear
from sterna.quant.adapted import twin
from sterna.quant.formats import WeightFormat
from sterna.quant.linear import QuantModule, quant_modules, replace_weight, weight_shapes
from sterna.quant.rtn import quantize_weight
from sterna.train.adapter import adapted_modules
from sterna.train.adapter_modules import AdaptedModule


class RolloutCopy:
    """A decoder that shares with the policy what is not rounded or merged; `renew` follows it."""

    def __init__(self, policy: Decoder, form: WeightFormat | None) -> None:
        """`form`: None = plain weights with the adapter merged in.

        ConfigError for a policy without an adapter to merge, or on a quantised base.
        """
        if any(True for _ in quant_modules(policy)):
            raise ConfigError(
                "the policy's base is quantised, so rollouts read it as it is; set "
                'rollout.weights to "policy"',
                param="rollout.weights",
            )
        self.decoder = twin(policy)
        self._policy = policy
        self._form = form
        if form is None:
            self._own_weights()
        self.renew()

    @torch.no_grad()
    def renew(self) -> None:
        """Take over the policy's weights, in place once there are any."""
        served = dict(quant_modules(self.decoder))
        for name, weight, is_gated in plain_weights(self._policy):
            if self._form is None:
                module = self.decoder.get_submodule(name)
                if isinstance(self._policy.get_submodule(name), AdaptedModule):
                    module.get_parameter("weight").copy_(weight)
                continue
            found = quantize_weight(
                weight, self._form, search="absmax", is_gated=is_gated, name=name
            )
            if name in served:
                _overwrite(served[name], found.tiles, found.scales, found.row_formats)
            else:
                replace_weight(self.decoder, name, found)

    def _own_weights(self) -> None:
        """Memory for the merged weights, beside the base's, which the trainer goes on reading."""
        names = [name for name, _ in adapted_modules(self._policy)]
        if not names:
            raise ConfigError(
                'rollout.weights is "merged", but the policy has no [adapter]; set it to "policy"',
                param="rollout.weights",
            )
        for name in names:
            parent, _, leaf = name.rpartition(".")
            module = self.decoder.get_submodule(name)
            assert isinstance(module, Linear | GatedLinear)
            own = copy.copy(module)
            own._parameters = dict(module._parameters)
            own.weight = nn.Parameter(torch.empty_like(module.weight), requires_grad=False)
            setattr(self.decoder.get_submodule(parent), leaf, own)


def plain_weights(policy: Decoder) -> Iterator[tuple[str, Tensor, bool]]:
    """(module, weight, is_gated) of every matrix, adapters merged in."""
    for name, _, _, is_gated in list(weight_shapes(policy)):
        own = name.removesuffix(".base")
        weight = policy.get_parameter(f"{name}.weight").detach()
        module = policy.get_submodule(own)
        yield (
            own,
            _merged(module, weight) if isinstance(module, AdaptedModule) else weight,
            is_gated,
        )


def _merged(module: AdaptedModule, weight: Tensor) -> Tensor:
    out = weight.clone()
    for part in module.adapters():
        rows = out[part.span.start : part.span.stop]
        rows.copy_(part.merged(rows))
    return out


def _overwrite(module: QuantModule, tiles: Tensor, scales: Tensor, formats: Tensor | None) -> None:
    """A recorded step keeps the addresses of the tensors, so they are filled, not replaced."""
    module.tiles.copy_(tiles)
    module.scales.copy_(scales)
    if formats is not None and module.row_formats is not None:
        module.row_formats.copy_(formats)
