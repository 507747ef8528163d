"""A and B of one run: one flat fp32 buffer, and PEFT's config and file format.

What always holds: the order of sites is that of the base model's modules, and for each A stands before B, so that two
adapters of the same `Layout` differ in nothing but numbers. A site with experts holds A as `[E, R, I]` and B as
`[E, O, R]`; `to_peft` and `from_peft` turn them into PEFT's form (see README.md).
"""

# E experts, R rank, I in, O out

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from jobs.operations import LoraConfig
from worker.engine.errors import UnreadableStateError

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Site:
    """A place in the base model where LoRA enters.

    Attributes:
        name: path of the module, for experts followed by the parameter's name.
        peft_module: path under which PEFT keeps A and B of this site.
        num_experts: None for a linear module.
    """

    name: str
    peft_module: str
    in_features: int
    out_features: int
    num_experts: int | None = None

    def a_shape(self, rank: int) -> tuple[int, ...]:
        """`[R, I]`, or `[E, R, I]`."""
        return (*self._experts, rank, self.in_features)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        """`[O, R]`, or `[E, O, R]`."""
        return (*self._experts, self.out_features, rank)

    @property
    def _experts(self) -> tuple[int, ...]:
        return () if self.num_experts is None else (self.num_experts,)


@dataclass(frozen=True)
class Layout:
    """Which sites an adapter has, and its rank: says what every number of a flat buffer is."""

    sites: tuple[Site, ...]
    rank: int

    @cached_property
    def numel(self) -> int:
        """Numbers in a flat buffer."""
        return sum(math.prod(site.a_shape(self.rank)) + math.prod(site.b_shape(self.rank)) for site in self.sites)

    def describe(self) -> dict[str, list[list[int]]]:
        """Shapes of A and B by site, as they stand in stored state."""
        return {site.name: [list(site.a_shape(self.rank)), list(site.b_shape(self.rank))] for site in self.sites}


class Factors:
    """A and B of every site as views of one flat buffer: of weights, of gradients, or of moments."""

    def __init__(self, layout: Layout, flat: Tensor) -> None:
        if flat.shape != (layout.numel,):
            raise UnreadableStateError(f"adapter has {flat.numel()} numbers, this run's has {layout.numel}")
        self.layout = layout
        self.flat = flat
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        start = 0
        for site in layout.sites:
            for views, shape in ((self.a, site.a_shape(layout.rank)), (self.b, site.b_shape(layout.rank))):
                stop = start + math.prod(shape)
                views[site.name] = flat[start:stop].view(shape)
                start = stop

    @classmethod
    def zeros(cls, layout: Layout, device: torch.device) -> Self:
        """All zero, fp32."""
        return cls(layout, torch.zeros(layout.numel, dtype=torch.float32, device=device))

    def to_peft_tensors(self) -> dict[str, Tensor]:
        """Tensors by the names PEFT gives them in a file, on CPU, contiguous."""
        tensors = {}
        for site in self.layout.sites:
            a, b = self.a[site.name].detach().cpu(), self.b[site.name].detach().cpu()
            if site.num_experts is not None:
                a = a.reshape(-1, site.in_features)
                b = b.permute(1, 2, 0).reshape(site.out_features, -1)
            tensors[f"{PEFT_PREFIX}{site.peft_module}.lora_A.weight"] = a.contiguous()
            tensors[f"{PEFT_PREFIX}{site.peft_module}.lora_B.weight"] = b.contiguous()
        return tensors

    def copy_from_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the numbers of a file in PEFT's form.

        Args:
            tensors: exactly those of this layout, any floating dtype.

        Raises:
            UnreadableStateError: a tensor is missing, unknown, or of another shape.
        """
        unknown = set(tensors)
        for site in self.layout.sites:
            for factor, views in (("A", self.a), ("B", self.b)):
                key = f"{PEFT_PREFIX}{site.peft_module}.lora_{factor}.weight"
                if key not in tensors:
                    raise UnreadableStateError(f"checkpoint has no tensor {key!r}, which this run's adapter needs")
                unknown.discard(key)
                views[site.name].copy_(_from_peft(key, tensors[key], site, self.layout.rank, factor))
        if unknown:
            raise UnreadableStateError(f"checkpoint has tensors that this run's adapter lacks: {sorted(unknown)[:5]}")


def _from_peft(key: str, tensor: Tensor, site: Site, rank: int, factor: str) -> Tensor:
    experts = site.num_experts or 1
    wanted = (rank * experts, site.in_features) if factor == "A" else (site.out_features, rank * experts)
    if tuple(tensor.shape) != wanted:
        raise UnreadableStateError(f"tensor {key!r} has shape {list(tensor.shape)}, this run's has {list(wanted)}")
    if site.num_experts is None:
        return tensor
    if factor == "A":
        return tensor.reshape(experts, rank, site.in_features)
    return tensor.reshape(site.out_features, rank, experts).permute(2, 0, 1)


class Adapter(Factors):
    """The trainable weights of one run; always fp32, whatever the base model's dtype."""

    def __init__(self, layout: Layout, flat: Tensor, lora: LoraConfig) -> None:
        super().__init__(layout, flat)
        self.lora = lora
        self.scaling = lora.alpha / lora.rank

    @classmethod
    def create(cls, layout: Layout, lora: LoraConfig, device: torch.device) -> Adapter:
        """Weights of a new run: A kaiming-uniform as in PEFT, B zero.

        Each site draws from its own generator, keyed by `lora.seed` and the site's name, so that the numbers depend
        neither on the device nor on which other sites are trained.
        """
        flat = torch.zeros(layout.numel, dtype=torch.float32)
        adapter = cls(layout, flat, lora)
        for site in layout.sites:
            digest = hashlib.blake2b(f"{lora.seed}:{site.name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            bound = 1 / math.sqrt(site.in_features)  # kaiming_uniform with a = sqrt(5)
            adapter.a[site.name].uniform_(-bound, bound, generator=generator)
        return cls(layout, flat.to(device), lora)

    @classmethod
    def from_peft(
        cls, layout: Layout, lora: LoraConfig, tensors: Mapping[str, Tensor], device: torch.device
    ) -> Adapter:
        """The adapter whose file `to_peft` describes.

        Raises:
            UnreadableStateError: a tensor is missing, unknown, or of another shape.
        """
        adapter = cls(layout, torch.zeros(layout.numel, dtype=torch.float32, device=device), lora)
        adapter.copy_from_peft_tensors(tensors)
        return adapter

    @property
    def nbytes(self) -> int:
        """Memory of the weights, in bytes."""
        return self.flat.nbytes

    def to_peft(self, base_model_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `adapter_config.json` and `adapter_model.safetensors` hold.

        Args:
            base_model_name: what the config names as `base_model_name_or_path`.
        """
        linear = {site.name.rsplit(".", 1)[-1] for site in self.layout.sites if site.num_experts is None}
        experts = {".".join(site.name.split(".")[-3:]) for site in self.layout.sites if site.num_experts is not None}
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model_name,
            "r": self.lora.rank,
            "lora_alpha": int(self.lora.alpha) if self.lora.alpha == int(self.lora.alpha) else self.lora.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "inference_mode": True,
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
            "target_modules": sorted(linear),
        }
        if experts:
            config["target_parameters"] = sorted(experts)
        return config, self.to_peft_tensors()
