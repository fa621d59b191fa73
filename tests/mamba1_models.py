"""Small models of Mamba-1's kin, of 512 tokens, and what their tests share."""

import torch
from conftest import from_origin, train_steps
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    ZambaConfig,
    ZambaForCausalLM,
    set_seed,
)
from transformers.models.jamba.modeling_jamba import JambaMambaMixer

from hf_compressm import parameter_groups
from hf_compressm.architectures import state_layers
from hf_compressm.theory.selective import heads_of


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


@from_origin
def build_zamba(seed: int = 0) -> ZambaForCausalLM:
    """Two heads; the second and the third of four layers share attention."""
    set_seed(seed)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "n_mamba_heads": 2}
    kinds = ["linear_attention", "hybrid", "hybrid", "linear_attention"]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "layers_block_type": kinds}
    return ZambaForCausalLM(ZambaConfig(**sizes, **heads))


BUILDERS = {"falcon_mamba": build_falcon_mamba, "jamba": build_jamba, "zamba": build_zamba}


def trained_on(model, batches):
    """The model after a step on each batch, in evaluation mode."""
    train_steps(model, torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3), batches)
    return model.eval()


@torch.no_grad()
def logits_of(model, ids, **arguments) -> torch.Tensor:
    return model.eval()(input_ids=ids, **arguments).logits


@torch.no_grad()
def make_twins(model) -> None:
    """Let the second half of the states of each head do what the first half does."""
    layers = state_layers(model)
    for index, mixer in layers.items():
        half = layers.sizes[index] // 2
        for maps in heads_of(layers.family.maps(layers.parameters(index), mixer)):
            maps.A_log.copy_((torch.rand(maps.A_log.shape) * 3).log())
            maps.A_log[:, half:] = maps.A_log[:, :half]
            for of_states in (maps.B_rows, maps.C_rows, maps.B_weights, maps.C_weights):
                if of_states is not None:
                    of_states[half:] = of_states[:half]


def first_half(layer) -> torch.Tensor:
    """A criterion that prefers the first half of the states."""
    size = len(layer.B_rows)
    return 1.0 + (torch.arange(size) < size // 2).double()
