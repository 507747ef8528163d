"""Mixture-of-experts layers: routed rows, and LoRA on each expert's projections.

Rows are sorted by expert; each expert's product is taken by itself, and each segment's delta on each expert too, so
that neither depends on what else is packed. The router is the base model's own and is never adapted.
"""

# T packed tokens, K experts per token, S = T·K routed rows sorted by expert, I in, O out, D hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.errors import UnsupportedModelError
from worker.engine.lora import Delta, LoraScope, Segment
from worker.engine.rows import rows_product

GATE_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True, eq=False)
class Piece:
    """Routed rows `[start, stop)`: those of one expert and one span of the packed batch."""

    expert: int
    start: int
    stop: int
    segment: Segment | None

    def delta_at(self, site: str) -> Delta | None:
        """What the segment's adapter adds to this expert; None if it has no such site."""
        adapter = self.segment.adapter if self.segment is not None else None
        if self.segment is None or adapter is None or site not in adapter.a:
            return None
        a_RI, b_OR = adapter.a[site][self.expert], adapter.b[site][self.expert]
        gradients = self.segment.gradients
        if gradients is None:
            return Delta(self.start, self.stop, a_RI, b_OR, adapter.scaling)
        da_RI, db_OR = gradients.a[site][self.expert], gradients.b[site][self.expert]
        return Delta(self.start, self.stop, a_RI, b_OR, adapter.scaling, da_RI, db_OR)


@dataclass(frozen=True, eq=False)
class Routing:
    """Where every token goes.

    Attributes:
        order: int64 `[S]`, index into the `T·K` pairs of token and choice, sorted by expert, then by token.
        pieces: all S rows in order.
    """

    order: Tensor
    pieces: tuple[Piece, ...]

    def experts(self) -> list[tuple[int, int, int]]:
        """`(expert, start, stop)` of every expert with rows."""
        spans: list[tuple[int, int, int]] = []
        for piece in self.pieces:
            if spans and spans[-1][0] == piece.expert:
                spans[-1] = (piece.expert, spans[-1][1], piece.stop)
            else:
                spans.append((piece.expert, piece.start, piece.stop))
        return spans


def route(experts_TK: Tensor, num_experts: int, scope: LoraScope) -> Routing:
    """Sort rows by expert and cut them where the span of the packed batch changes."""
    num_choices = experts_TK.shape[1]
    spans = scope.spans or ((0, experts_TK.shape[0]),)
    sizes = torch.tensor([stop - start for start, stop in spans]) * num_choices
    span_S = torch.repeat_interleave(torch.arange(len(spans)), sizes).to(experts_TK.device)
    key_S = experts_TK.reshape(-1) * len(spans) + span_S
    counts = torch.bincount(key_S, minlength=num_experts * len(spans)).tolist()
    segments = {segment.start: segment for segment in scope.segments if segment.stop > segment.start}
    pieces = []
    start = 0
    for key, count in enumerate(counts):
        if count:
            expert, span = divmod(key, len(spans))
            pieces.append(Piece(expert, start, start + count, segments.get(spans[span][0])))
            start += count
    return Routing(torch.argsort(key_S, stable=True), tuple(pieces))


class LoraExperts(nn.Module):
    """The frozen experts of one layer, and the place where adapters enter them."""

    def __init__(self, experts: nn.Module, site: str, scope: LoraScope) -> None:
        super().__init__()
        _check_supported(experts)
        self.gate_up_proj: Tensor = experts.gate_up_proj  # type: ignore[assignment]
        self.down_proj: Tensor = experts.down_proj  # type: ignore[assignment]
        self.num_experts = self.gate_up_proj.shape[0]
        self.site = site
        # in a list, so that the original does not become a submodule
        self._gate: list[Callable[[Tensor], Tensor]] = [experts._apply_gate]  # type: ignore[list-item]
        self._scope = scope

    def forward(self, hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """`[T, D]` → `[T, D]`: the weighted sum of what a token's experts make of it."""
        num_tokens, num_choices = experts_TK.shape
        routing = route(experts_TK, self.num_experts, self._scope)
        x_SD = hidden_TD[routing.order // num_choices]
        gate_up_SO = self._linear(GATE_UP, x_SD, routing)
        gated_SI = self._gated(gate_up_SO, routing)
        y_SD = self._linear(DOWN, gated_SI, routing)
        unsorted_SD = y_SD[torch.argsort(routing.order)]
        weighted_TKD = unsorted_SD.view(num_tokens, num_choices, -1) * weights_TK[..., None]
        return weighted_TKD.sum(1).to(hidden_TD.dtype)

    def _linear(self, name: str, x_SI: Tensor, routing: Routing) -> Tensor:
        site = f"{self.site}.{name}"
        y_SO: Tensor = _ExpertsLinear.apply(x_SI, getattr(self, name), site, routing)  # type: ignore[no-untyped-call]
        return y_SO

    def _gated(self, gate_up_SO: Tensor, routing: Routing) -> Tensor:
        if gate_up_SO.device.type != "cpu":
            return self._gate[0](gate_up_SO)
        sizes = [piece.stop - piece.start for piece in routing.pieces]
        return torch.cat([self._gate[0](part) for part in torch.split(gate_up_SO, sizes)])


class _ExpertsLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, weight_EOI: Tensor, site: str, routing: Routing) -> Tensor:
        y_SO = x_SI.new_empty(x_SI.shape[0], weight_EOI.shape[1])
        experts = routing.experts()
        for expert, start, stop in experts:
            y_SO[start:stop] = rows_product(x_SI[start:stop], weight_EOI[expert].t())
        deltas = [delta for piece in routing.pieces if (delta := piece.delta_at(site)) is not None]
        lows = [delta.add(y_SO, x_SI) for delta in deltas]
        ctx.save_for_backward(x_SI, *lows)
        ctx.weight_EOI, ctx.deltas, ctx.experts = weight_EOI, deltas, experts
        return y_SO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        dy_SO = grads[0].contiguous()
        x_SI, *lows = ctx.saved_tensors
        dx_SI = torch.empty_like(x_SI)
        for expert, start, stop in ctx.experts:
            dx_SI[start:stop] = rows_product(dy_SO[start:stop], ctx.weight_EOI[expert])
        for delta, low_NR in zip(ctx.deltas, lows, strict=True):
            delta.add_backward(dx_SI, dy_SO, x_SI, low_NR)
        return dx_SI, None, None, None


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds the stacked weights of experts."""
    return isinstance(getattr(module, GATE_UP, None), nn.Parameter) and hasattr(module, "num_experts")


def _check_supported(experts: nn.Module) -> None:
    flags: Sequence[tuple[str, bool]] = (("has_gate", True), ("has_bias", False), ("is_transposed", False))
    wrong = [name for name, wanted in flags if getattr(experts, name, wanted) is not wanted]
    if getattr(experts, "has_post_expert_norm", False):
        wrong.append("has_post_expert_norm")
    if wrong or not hasattr(experts, "_apply_gate"):
        raise UnsupportedModelError(
            f"experts of class {type(experts).__name__} differ in {wrong or 'their gate'} from gated experts without "
            "bias; choose another base model"
        )
