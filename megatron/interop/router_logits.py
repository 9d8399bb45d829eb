"""Router logits as the output of a module, which is what transformers can record."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.moe.routing import GateInput


class RouterLogits(nn.Module):
    """Has the logits of a layer's router as its output; see `MoELayer.router_logits`."""

    def forward(self, logits_TC: Tensor | None, inp: GateInput) -> tuple[Tensor | None]:
        """Return the logits [T, C] of all positions, which are 0 for padding.

        Args:
            logits_TC: logits of the positions that are not padding; None: the gate has none.
            inp: input of the gate, with padding.
        """
        if logits_TC is None or inp.padding_T is None:
            return (logits_TC,)
        all_TC = logits_TC.new_zeros(len(inp.x_TD), logits_TC.shape[1])
        return (all_TC.index_copy(0, inp.unpadded_R, logits_TC),)
