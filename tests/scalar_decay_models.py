"""Small models with layers of Mamba-2's kind, of every family that has them, plain and balanced."""

from functools import partial

import torch
from conftest import VOCABULARY, from_origin, with_states_that_count
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed

from hf_compressm.architectures.scalar_decay import balanced  # noqa: F401, for the Auto classes

BASE = dict(vocab_size=VOCABULARY, hidden_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=True)
ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2)
HYBRID = BASE | ATTENTION | dict(intermediate_size=48, num_hidden_layers=2)
HYBRID |= dict(mamba_n_heads=4, mamba_d_state=16, mamba_n_groups=2, mamba_chunk_size=16)
EXPERTS = dict(n_routed_experts=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=32)

# Model type → what its config says: 16 states in each of two groups, in two layers, with others between them.
CONFIGS = {
    "mamba2": BASE | dict(num_hidden_layers=2, state_size=16, num_heads=4, head_dim=16, n_groups=2, chunk_size=16),
    "bamba": HYBRID | dict(num_hidden_layers=3, attn_layer_indices=[1]),
    "falcon_h1": HYBRID | dict(mamba_d_ssm=64, ssm_multipliers=[1.0, 0.9, 0.8, 0.7, 0.6]),
    "granitemoehybrid": HYBRID
    | dict(num_hidden_layers=3, num_local_experts=2, shared_intermediate_size=32)
    | dict(layer_types=["linear_attention", "full_attention", "linear_attention"]),
    "nemotron_h": BASE
    | ATTENTION
    | EXPERTS
    | dict(layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention", "moe"], head_dim=8)
    | dict(ssm_state_size=16, mamba_num_heads=4, mamba_head_dim=16, n_groups=2, chunk_size=16, intermediate_size=48),
    "zamba2": BASE
    | dict(num_attention_heads=4, intermediate_size=48, num_hidden_layers=3, num_mem_blocks=1)
    | dict(layers_block_type=["linear_attention", "hybrid", "linear_attention"], use_mem_rope=True)
    | dict(mamba_d_state=16, n_mamba_heads=4, mamba_ngroups=2, chunk_size=16),
}


def config_of(model_type: str, **changes) -> PreTrainedConfig:
    """What a small model of the family has, or of its balanced class, and changes."""
    return AutoConfig.for_model(model_type, **(CONFIGS[model_type.removeprefix("compressm_")] | changes))


@from_origin
def build_scalar_decay(seed: int = 0, model_type: str = "mamba2", **changes) -> PreTrainedModel:
    """Build a model of a family, or of its balanced class with a state of 12; its states count for something."""
    set_seed(seed)
    if model_type.startswith("compressm_"):
        changes = {"balanced_state_size": 12} | changes
    model = with_states_that_count(AutoModelForCausalLM.from_config(config_of(model_type, **changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "B_proj" in name or "C_proj" in name:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model


build_mamba2 = partial(build_scalar_decay, model_type="mamba2")
build_bamba = partial(build_scalar_decay, model_type="bamba")
