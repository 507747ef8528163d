"""Which modules of a base model LoRA enters, and their wrapping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from jobs.operations import LoraConfig
from worker.engine.adapter import Layout, Site
from worker.engine.elementwise import RowActivation
from worker.engine.errors import UnsupportedAdapterError
from worker.engine.experts import DOWN, GATE_UP, LoraExperts, RowRouter, is_experts, is_router
from worker.engine.lora import LoraLinear, LoraScope
from worker.engine.rotary import RotaryTable

ATTENTION_MODULES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"})
MLP_MODULES = frozenset({"gate_proj", "up_proj", "down_proj", "gate_up_proj"})


@dataclass(frozen=True)
class LoraSites:
    """Every place of one base model where LoRA can enter, in module order.

    Attributes:
        attention: `train_attn`: query, key, value and output projections.
        mlp: `train_mlp`: gate, up and down projections, of experts too; never a router.
        head: `train_unembed`: the output projection.
    """

    attention: tuple[Site, ...]
    mlp: tuple[Site, ...]
    head: Site

    def layout(self, lora: LoraConfig) -> Layout:
        """Sites and rank of a run of this configuration.

        Raises:
            UnsupportedAdapterError: nothing is to be trained, or the model has no such place.
        """
        if lora.rank < 1:
            raise UnsupportedAdapterError(f"LoRA rank must be at least 1, not {lora.rank}")
        chosen: list[Site] = []
        for flag, sites in (("train_attn", self.attention), ("train_mlp", self.mlp), ("train_unembed", (self.head,))):
            if getattr(lora, flag):
                if not sites:
                    raise UnsupportedAdapterError(f"this base model has no modules for {flag}; set {flag} to false")
                chosen += sites
        if not chosen:
            raise UnsupportedAdapterError("set at least one of train_attn, train_mlp and train_unembed to true")
        return Layout(tuple(chosen), lora.rank)


def wrap(model: Any, scope: LoraScope) -> LoraSites:
    """Replace the modules that LoRA enters by ones that look into `scope`.

    If its products are exact, modules that would depend on company are replaced too.

    Returns:
        The sites, in module order.
    """
    attention: list[Site] = []
    mlp: list[Site] = []
    head = model.get_output_embeddings()
    head_site: Site | None = None
    for name, module in list(model.named_modules()):
        parent = name.rpartition(".")[0]
        if isinstance(model.get_submodule(parent), LoraExperts):
            continue  # the activation of experts, wrapped just before
        last = name.rsplit(".", 1)[-1]
        if module is head:
            head_site = Site(name, name, head.in_features, head.out_features)
        elif isinstance(module, nn.Linear):
            if last in ATTENTION_MODULES | MLP_MODULES:
                site = Site(name, name, module.in_features, module.out_features)
                (attention if last in ATTENTION_MODULES else mlp).append(site)
            model.set_submodule(name, LoraLinear(module, name, scope))
        elif is_experts(module):
            experts = LoraExperts(module, name, scope)
            mlp += _expert_sites(experts)
            model.set_submodule(name, experts)
        elif scope.products.exact and is_router(module):
            model.set_submodule(name, RowRouter(module, scope.products))
        elif scope.products.exact and last == "act_fn":
            model.set_submodule(name, RowActivation(module))
        elif last == "rotary_emb" and (scope.products.exact or model.device.type == "cpu"):
            model.set_submodule(name, RotaryTable(module))
    assert head_site is not None
    return LoraSites(tuple(attention), tuple(mlp), head_site)


def _expert_sites(experts: LoraExperts) -> list[Site]:
    # PEFT nests its wrappers of two parameters of one module; the first parameter's is the inner one
    nested = {GATE_UP: f"{experts.site}.base_layer", DOWN: experts.site}
    return [
        Site(
            f"{experts.site}.{name}",
            peft_module,
            in_features=int(getattr(experts, name).shape[2]),
            out_features=int(getattr(experts, name).shape[1]),
            num_experts=experts.num_experts,
        )
        for name, peft_module in nested.items()
    ]
