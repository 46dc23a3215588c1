"""The LoRA adapter: attach it, count what is trained. Saving and loading are PEFT's own."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import EsmModel


def attach_adapter(
    model: EsmModel,
    *,
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.1,
    targets: tuple[str, ...] = ("query", "value"),
) -> PeftModel:
    """Freeze a model and put a float32 adapter beside its target layers.

    Reference: Hu et al. (2021), https://arxiv.org/abs/2106.09685
    """
    model.requires_grad_(False)
    tuned = get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)),
    )
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return tuned


def count_parameters(module: torch.nn.Module) -> tuple[int, int]:
    """Trainable parameters, and all."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in module.parameters())
