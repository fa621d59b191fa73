"""Small models of Mamba-1's kin, of 512 tokens."""

import torch
from conftest import from_origin
from transformers import FalconMambaConfig, FalconMambaForCausalLM, JambaConfig, JambaForCausalLM, set_seed
from transformers.models.jamba.modeling_jamba import JambaMambaMixer


@from_origin
def build_falcon_mamba(seed: int = 0) -> FalconMambaForCausalLM:
    set_seed(seed)
    config = FalconMambaConfig(vocab_size=512, hidden_size=32, state_size=16, num_hidden_layers=2)
    return FalconMambaForCausalLM(config)


@from_origin
def build_jamba(seed: int = 0, **changes) -> JambaForCausalLM:
    """Attention in the second layer of four, experts in two, and weights of norms that differ."""
    set_seed(seed)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_experts": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_period": 4, "attn_layer_offset": 1}
    model = JambaForCausalLM(JambaConfig(**(sizes | heads | changes)))
    with torch.no_grad():
        for mixer in (module for module in model.modules() if isinstance(module, JambaMambaMixer)):
            for norm in (mixer.b_layernorm, mixer.c_layernorm):
                norm.weight.uniform_(0.5, 1.5)
    return model
