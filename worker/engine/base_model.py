"""A frozen transformers model on one device, and the places where LoRA enters it.

What always holds: base weights never change and never get gradients; training and sampling go through the same
modules; an architecture is refused unless the packed pass reproduces its own logits when it is loaded.
"""

# T packed tokens, D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from jobs.operations import LoraConfig
from worker.engine.adapter import Layout
from worker.engine.architecture import check_company, check_config, check_reproduced, reference_logits
from worker.engine.attention import ATTENTION_NAME, Attention, TruncatedAttention
from worker.engine.errors import UnsupportedModelError
from worker.engine.experts import LoraExperts
from worker.engine.lora import Delta, LoraLinear, LoraScope, Segment
from worker.engine.numerics import describe
from worker.engine.rows import Products
from worker.engine.sites import LoraSites, wrap


class BaseModel:
    """The model that adapters are trained on and sampled from.

    Attributes:
        name: the name it is served under.
        device, dtype: of the base weights.
        config: the transformers config.
        vocab_size: rows of the output projection; token ids are below it.
        context_length: most tokens of one sequence.
        eos_token_ids: tokens that end a text, from the generation config and the model config.
        num_parameters: of the base model, each counted once.
        matmul_parameters: numbers that a token is multiplied with: linear modules, its active experts, the output
            projection.
        products: how matrix products are taken; exact ones give a row the same bits in any company.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        eos_token_ids: tuple[int, ...] = (),
        deterministic: bool | None = None,
    ) -> None:
        """Take over a transformers model that is on its device; use `load` for one on disk.

        Args:
            model: frozen from here on, and changed: its linear modules are wrapped.
            name: the name it is served under.
            eos_token_ids: tokens that end a text.
            deterministic: whether results are the same bit for bit in any company; None: on CPU.

        Raises:
            UnsupportedModelError: the engine would not compute what the model computes, or not the same in any company.
        """
        check_config(model.config)
        model.eval().requires_grad_(False)
        self.name = name
        self.config = model.config
        self.device, self.dtype = model.device, model.dtype
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.context_length = int(model.config.max_position_embeddings)
        self.eos_token_ids = eos_token_ids
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        expected = reference_logits(model)
        self._model = model
        self.products = Products(exact=self.device.type == "cpu" if deterministic is None else deterministic)
        self._scope = LoraScope(self.products)
        self._head: nn.Linear = model.get_output_embeddings()
        self._sites: LoraSites = wrap(model, self._scope)
        self.matmul_parameters = _matmul_parameters(model, self._head)
        model.set_attn_implementation(ATTENTION_NAME)
        if self.deterministic:
            self._try_products()
        check_reproduced(self, expected)
        if self.deterministic:
            check_company(self)

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        deterministic: bool | None = None,
    ) -> BaseModel:
        """Load a model from a directory in Hugging Face's layout: safetensors only, no code from the directory.

        Args:
            directory: holds `config.json` and `*.safetensors`.
            name: the name it is served under.
            device: where weights live and passes run.
            dtype: of the base weights; adapters are fp32 all the same.
            deterministic: whether results are the same bit for bit in any company; None: on CPU.

        Raises:
            UnsupportedModelError: the files cannot be used, or the engine would not compute what the model computes.
        """
        transformers_logging.disable_progress_bar()
        if not any(directory.glob("*.safetensors")):
            raise UnsupportedModelError(f"{name}: the model's directory holds no *.safetensors; convert the weights")
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(directory, **options)
            check_config(config)
            model = AutoModelForCausalLM.from_pretrained(
                directory, config=config, dtype=dtype, use_safetensors=True, attn_implementation="sdpa", **options
            )
        except (OSError, ValueError) as error:
            raise UnsupportedModelError(f"{name}: transformers cannot load the model: {error}") from error
        ids = _eos_token_ids(directory, config)
        return cls(model.to(device), name=name, eos_token_ids=ids, deterministic=deterministic)

    @property
    def deterministic(self) -> bool:
        """Whether what an operation computes is the same bit for bit in any company."""
        return self.products.exact

    @property
    def numerics(self) -> dict[str, str]:
        """What bits depend on beside the operation: two workers that say the same here compute the same."""
        return describe(self.device, self.dtype, self.products)

    def layout(self, lora: LoraConfig) -> Layout:
        """Where a run of this configuration has A and B, and of which shapes.

        Raises:
            UnsupportedAdapterError: nothing is to be trained, or the model has no such place.
        """
        layout = self._sites.layout(lora)
        if self.deterministic:
            self._try_factors(layout)
        return layout

    def hidden(
        self, tokens_T: Tensor, positions_T: Tensor, *, segments: Sequence[Segment], attention: Attention
    ) -> Tensor:
        """The last hidden state, after the final norm.

        With gradients enabled, its backward pass adds each segment's gradients to that segment's buffers.

        Args:
            tokens_T, positions_T: int64, on the model's device.
            segments: which rows belong to which adapter; rows in none get the base model alone.
            attention: how the rows attend.

        Returns:
            `[T, D]` in the base dtype.
        """
        num_tokens = tokens_T.shape[0]
        missing = self.products.padded_rows(num_tokens) - num_tokens if self.deterministic else 0
        if missing:
            tokens_T, positions_T = _pad(tokens_T, missing), _pad(positions_T, missing)
            attention = TruncatedAttention(attention, num_tokens)
        embedded_1TD = self._model.get_input_embeddings()(tokens_T)[None]
        if torch.is_grad_enabled():
            embedded_1TD.requires_grad_()  # so that backward passes reach the first layer's adapters
        with self._scope.entered(segments, num_tokens + missing):
            output = self._model.get_decoder()(
                inputs_embeds=embedded_1TD, position_ids=positions_T[None], use_cache=False, attention=attention
            )
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD[:num_tokens]

    @property
    def head_weight(self) -> Tensor:
        """The output projection, `[V, D]`."""
        return self._head.weight

    @property
    def head_site(self) -> str:
        """Name of the output projection's LoRA site."""
        return self._sites.head.name

    def logits(self, hidden_TD: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Logits in fp32, without gradients.

        Args:
            hidden_TD: rows of what `hidden` returned.
            segments: of these rows.

        Returns:
            `[T, V]` fp32.
        """
        logits_TV = self.products.frozen(hidden_TD, self.head_weight.t()).float()
        for segment in segments:
            delta = Delta.of_segment(segment, self.head_site, self.products)
            if delta is not None:
                delta.add(logits_TV, hidden_TD)
        return logits_TV

    def _try_products(self) -> None:
        """Find the rules of all products with frozen weights, forward and backward."""
        for module in self._model.modules():
            if isinstance(module, LoraLinear):
                self._try_both(module.weight)
            elif isinstance(module, LoraExperts):
                self._try_both(module.gate_up_proj[0])
                self._try_both(module.down_proj[0])
        self._try_both(self.head_weight)

    def _try_both(self, weight_OI: Tensor) -> None:
        self.products.rule_of_frozen(weight_OI.t())
        self.products.rule_of_frozen(weight_OI)

    def _try_factors(self, layout: Layout) -> None:
        """Find the rules of all products with this layout's A and B."""
        for size_in, size_out in {(site.in_features, site.out_features) for site in layout.sites}:
            a_RI = torch.empty(layout.rank, size_in, device=self.device)
            b_OR = torch.empty(size_out, layout.rank, device=self.device)
            for factor in (a_RI.t(), a_RI, b_OR.t(), b_OR):
                self.products.rule_of_factor(factor)


def _pad(values_T: Tensor, missing: int) -> Tensor:
    return torch.cat([values_T, values_T.new_zeros(missing)])


def _matmul_parameters(model: nn.Module, head: nn.Linear) -> int:
    total = head.weight.numel()
    num_choices = int(getattr(model.config, "num_experts_per_tok", 0))
    for module in model.modules():
        if isinstance(module, LoraExperts):
            per_expert = (module.gate_up_proj.numel() + module.down_proj.numel()) // module.num_experts
            total += per_expert * num_choices
        elif module is not head and getattr(module, "in_features", None) and hasattr(module, "weight"):
            total += int(module.weight.numel())  # type: ignore[operator]
    return total


def _eos_token_ids(directory: Path, config: Any) -> tuple[int, ...]:
    ids: list[int] = []
    if (directory / "generation_config.json").exists():
        ids += _as_list(GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id)
    ids += _as_list(config.eos_token_id)
    return tuple(dict.fromkeys(ids))


def _as_list(value: int | Iterable[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
