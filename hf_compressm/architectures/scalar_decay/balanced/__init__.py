"""Transformers' Auto classes learn here of the models whose layers have states in balanced bases of their own."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling_compressm_balanced import (
    BALANCED_CLASSES,
    PLAIN_CLASSES,
    BalancedConfig,
    BalancedMixer,
    BalancedModel,
    balance_modules,
)

__all__ = [
    "BALANCED_CLASSES",
    "PLAIN_CLASSES",
    "BalancedConfig",
    "BalancedMixer",
    "BalancedModel",
    "balance_modules",
]

for balanced in PLAIN_CLASSES:
    if issubclass(balanced, BalancedConfig):
        AutoConfig.register(balanced.model_type, balanced, exist_ok=True)
    elif issubclass(balanced, BalancedModel):
        auto = AutoModelForCausalLM if balanced.__name__.endswith("ForCausalLM") else AutoModel
        auto.register(balanced.config_class, balanced, exist_ok=True)
