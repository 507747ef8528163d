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
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from worker.engine.elementwise import RowFunction
from worker.engine.errors import UnsupportedModelError
from worker.engine.lora import Delta, LoraScope, Segment
from worker.engine.rows import Products

GATE_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True, eq=False)
class Piece:
    """Routed rows `[start, stop)`: those of one expert and one span of the packed batch."""

    expert: int
    start: int
    stop: int
    segment: Segment | None

    def delta_at(self, site: str, products: Products) -> Delta | None:
        """What the segment's adapter adds to this expert; None if it has no such site."""
        adapter = self.segment.adapter if self.segment is not None else None
        if self.segment is None or adapter is None or site not in adapter.a:
            return None
        a_RI, b_OR = adapter.a[site][self.expert], adapter.b[site][self.expert]
        gradients = self.segment.gradients
        if gradients is None:
            return Delta(self.start, self.stop, a_RI, b_OR, adapter.scaling, products)
        da_RI, db_OR = gradients.a[site][self.expert], gradients.b[site][self.expert]
        return Delta(self.start, self.stop, a_RI, b_OR, adapter.scaling, products, da_RI, db_OR)


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


class RowRouter(nn.Module):
    """A model's own router, its product taken so that a token's choice does not depend on the other tokens."""

    def __init__(self, router: nn.Module, products: Products) -> None:
        super().__init__()
        self.router = router
        self._mode = _LinearThroughProducts(products)

    def forward(self, hidden_TD: Tensor) -> Any:
        """Whatever the router returns."""
        with self._mode:
            return self.router(hidden_TD)


class _LinearThroughProducts(TorchFunctionMode):
    def __init__(self, products: Products) -> None:
        super().__init__()
        self._products = products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear and len(args) == 2 and not kwargs:
            return _FrozenLinear.apply(*args, self._products)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, products: Products) -> Tensor:
        ctx.weight_OI, ctx.products = weight_OI, products
        return products.frozen(x_TI, weight_OI.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.products.frozen(grads[0].contiguous(), ctx.weight_OI), None, None


class LoraExperts(nn.Module):
    """The frozen experts of one layer, and the place where adapters enter them."""

    def __init__(self, experts: nn.Module, site: str, scope: LoraScope) -> None:
        super().__init__()
        _check_supported(experts)
        self.gate_up_proj: Tensor = experts.gate_up_proj  # type: ignore[assignment]
        self.down_proj: Tensor = experts.down_proj  # type: ignore[assignment]
        self.num_experts = self.gate_up_proj.shape[0]
        self.site = site
        gate: Callable[[Tensor], Tensor] = experts._apply_gate  # type: ignore[assignment]
        self._gate = RowFunction(gate, of_one_number=False) if scope.products.exact else gate
        self.products = scope.products
        self._scope = scope

    def forward(self, hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """`[T, D]` → `[T, D]`: the weighted sum of what a token's experts make of it."""
        num_tokens, num_choices = experts_TK.shape
        routing = route(experts_TK, self.num_experts, self._scope)
        x_SD = hidden_TD[routing.order // num_choices]
        gate_up_SO = self._linear(GATE_UP, x_SD, routing)
        y_SD = self._linear(DOWN, self._gate(gate_up_SO), routing)
        unsorted_SD = y_SD[torch.argsort(routing.order)]
        weighted_TKD = unsorted_SD.view(num_tokens, num_choices, -1) * weights_TK[..., None]
        total_TD = weighted_TKD[:, 0]
        for choice in range(1, num_choices):  # `sum` may add in an order that depends on the number of tokens
            total_TD = total_TD + weighted_TKD[:, choice]
        return total_TD.to(hidden_TD.dtype)

    def _linear(self, name: str, x_SI: Tensor, routing: Routing) -> Tensor:
        y_SO: Tensor = _ExpertsLinear.apply(x_SI, self, name, routing)  # type: ignore[no-untyped-call]
        return y_SO


class _ExpertsLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, module: LoraExperts, name: str, routing: Routing) -> Tensor:
        weight_EOI, products, site = getattr(module, name), module.products, f"{module.site}.{name}"
        y_SO = x_SI.new_empty(x_SI.shape[0], weight_EOI.shape[1])
        experts = routing.experts()
        for expert, start, stop in experts:
            y_SO[start:stop] = products.frozen(x_SI[start:stop], weight_EOI[expert].t())
        deltas = [delta for piece in routing.pieces if (delta := piece.delta_at(site, products)) is not None]
        lows = [delta.add(y_SO, x_SI) for delta in deltas]
        ctx.save_for_backward(x_SI, *lows)
        ctx.weight_EOI, ctx.products, ctx.deltas, ctx.experts = weight_EOI, products, deltas, experts
        return y_SO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        dy_SO = grads[0].contiguous()
        x_SI, *lows = ctx.saved_tensors
        dx_SI = torch.empty_like(x_SI)
        for expert, start, stop in ctx.experts:
            dx_SI[start:stop] = ctx.products.frozen(dy_SO[start:stop], ctx.weight_EOI[expert])
        for delta, low_NR in zip(ctx.deltas, lows, strict=True):
            delta.add_backward(dx_SI, dy_SO, x_SI, low_NR)
        return dx_SI, None, None, None


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds the stacked weights of experts."""
    return isinstance(getattr(module, GATE_UP, None), nn.Parameter) and hasattr(module, "num_experts")


def is_router(module: nn.Module) -> bool:
    """Whether the module chooses experts, and is no linear module itself."""
    return isinstance(getattr(module, "weight", None), nn.Parameter) and hasattr(module, "top_k")


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
