"""In these models each layer of Mamba-2's kind has a smaller state, in a balanced basis of its own.

A layer updates H_t = a_t H_{t-1} + Δ_t x_t B_tᵀ and reads y_t = H_t C_t + D x_t. Its decay a_t is one number for
a head, so it commutes with every change of basis: with B̃_t = W B_t and C̃_t = V C_t, for any W and V of shape (r, N),
the smaller state is exactly H̃_t = H_t Wᵀ at every t. Each mixer has W and V for each of its groups as `B_proj` and
`C_proj`, (G, r, N). They act after the convolution, the SiLU and the padding mask.

`config.balanced_state_size` is r: a number for all layers that have a state, or a list with an entry for each. With
None a layer does not project: its parameters are identities without use, and it is Transformers' layer bit for bit.

This file needs nothing but transformers. It is saved beside the weights of every such model, so that
`from_pretrained(..., trust_remote_code=True)` works where hf_compressm is not installed.
"""

import os
import shutil
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.bamba import modeling_bamba as bamba
from transformers.models.falcon_h1 import modeling_falcon_h1 as falcon_h1
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granitemoehybrid
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron_h
from transformers.models.zamba2 import modeling_zamba2 as zamba2

MODULE = "modeling_compressm_balanced"  # this file's name beside the weights


@dataclass(repr=False, kw_only=True)
class BalancedConfig:
    """The configuration adds r, the number of states that are left: for all layers with a state, or for each."""

    balanced_state_size: int | list[int | None] | None = None
    state_size_field = "mamba_d_state"  # the field of N

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate()  # what the class of Transformers validates
        self.reduced_state_sizes()

    def reduced_state_sizes(self) -> dict[int, int | None]:
        """Return r of each layer that has a state, by layer index; None where the layer does not project.

        Raises:
            ValueError: a size is not between 1 and N, or a list has not one entry for each layer with a state.
        """
        layers = [i for i, kind in enumerate(self.layer_types) if kind in ("linear_attention", "hybrid")]
        given, largest = self.balanced_state_size, getattr(self, self.state_size_field)
        sizes = given if isinstance(given, list | tuple) else [given] * len(layers)
        allowed = all(size is None or (type(size) is int and 1 <= size <= largest) for size in sizes)
        if not allowed or len(sizes) != len(layers):
            raise ValueError(
                f"balanced_state_size = {given!r}, expected None, a number from 1 to {self.state_size_field} = "
                f"{largest}, or a list of {len(layers)} of these, one for each layer that has a state."
            )
        return dict(zip(layers, sizes, strict=True))


class BalancedMixer:
    """The mixer projects B and C before the scan; while it does not, it is the mixer that it is mixed with.

    It looks the functions of Transformers up in their module at each call, since kernels and observers replace them
    there. The fused kernel of training cannot project, so it serves only while nothing is projected.
    """

    functions = None  # the module of Transformers' mixer
    reduced_state_size: int | None = None  # r; None while the mixer does not project

    def add_projections(self, size: int | None) -> None:
        """Register `B_proj` and `C_proj`: identities of `size` = r rows, or of N rows that are not used for None."""
        shape = self.n_groups, size or self.ssm_state_size, self.ssm_state_size
        for name in ("B_proj", "C_proj"):
            setattr(self, name, nn.Parameter(self.in_proj.weight.new_empty(shape)))
        self.initialise_projections()
        self.reduced_state_size = size

    def initialise_projections(self) -> None:
        """Set the projections to the first rows of identities, unless they were loaded."""
        for projection in (self.B_proj, self.C_proj):
            init.copy_(projection, torch.eye(*projection.shape[1:]).expand_as(projection))

    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        """Return what the layer adds to the residual stream, (batch, L, hidden size), for an input of that shape."""
        if self.reduced_state_size is None and self.B_proj.shape[1] == self.ssm_state_size:
            return super().forward(hidden_states, cache_params, attention_mask, **kwargs)
        return self._forward_projected(hidden_states, cache_params, attention_mask, **kwargs)

    @force_accelerate_hooks("conv1d")  # its weight is used without its forward
    def _forward_projected(self, hidden_states, cache_params, attention_mask, **kwargs):
        """Return what the layer adds with B and C projected; the state in the cache is (batch, heads, p, r)."""
        dtype, mask = hidden_states.dtype, self.functions.apply_mask_to_padding_states
        projected = self._project_input(mask(hidden_states, attention_mask))
        gate, xBC, time_step = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        xBC = mask(self._convolve(xBC.transpose(1, 2), cache_params, kwargs).transpose(1, 2), attention_mask)
        x, BC = xBC.tensor_split([self.intermediate_size], dim=-1)
        B, C = self._project(BC.unflatten(-1, (-1, self.ssm_state_size)))
        y = self._scan(x.unflatten(-1, (self.num_heads, self.head_dim)), time_step, B, C, cache_params, kwargs)
        return self.out_proj(self._gate_output(y, gate).to(dtype))

    def _project_input(self, hidden_states: Tensor) -> Tensor:
        return self.in_proj(hidden_states)

    def _project(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return B and C, (batch, L, G, r) each, of the features of both, (batch, L, 2 G, N), by one product."""
        projections = torch.cat([self.B_proj, self.C_proj])
        return torch.einsum("blgn,grn->blgr", features, projections).split(self.n_groups, dim=2)

    def _gate_output(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.norm(y, gate)

    def _convolve(self, xBC: Tensor, cache, kwargs: dict) -> Tensor:
        """Return silu(conv(xBC)), (batch, channels, L); the cache keeps the inputs that the next call needs."""
        weights, length = (self.conv1d.weight.squeeze(1), self.conv1d.bias), xBC.shape[-1]
        if cache is not None:
            past = cache.get_conv_state(self.layer_idx, state_idx=0)
            if past is not None and length == 1 and not cache.is_recording_past(self.layer_idx):
                return self.functions.causal_conv1d_update(xBC, past, *weights, activation=self.activation)
            xBC = cache.update_conv_state(xBC, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        xBC = self.functions.causal_conv1d_fn(xBC, *weights, activation=self.activation, **kwargs)
        return xBC if cache is None else xBC[..., -length:]  # the gradient of a slice is a copy

    def _scan(self, x: Tensor, time_step: Tensor, B: Tensor, C: Tensor, cache, kwargs: dict) -> Tensor:
        """Return the output of the scan, (batch, L, heads p), of x (batch, L, heads, p) and B, C (batch, L, G, r)."""
        A, D, bias, kwargs = -self.A_log.float().exp(), self.D, self.dt_bias, {"dt_softplus": True, **kwargs}
        state = None if cache is None else cache.get_recurrent_state(self.layer_idx, state_idx=0)
        if state is not None and x.shape[1] == 1:
            of_heads = (time_step[:, 0], A, D, bias)
            time_step, A, D, bias = (each[..., None].expand(*each.shape, self.head_dim) for each in of_heads)
            step = (x[:, 0], time_step, A[..., None].expand(*A.shape, B.shape[-1]), B[:, 0], C[:, 0], D)
            y = self.functions.mamba2_selective_state_update(state, *step, z=None, dt_bias=bias, **kwargs)
            return y.flatten(1)[:, None]
        kwargs |= {"z": None, "return_final_states": cache is not None, "initial_states": state}
        kwargs |= {"D": D, "dt_bias": bias, "dt_limit": self.time_step_limit, "chunk_size": self.chunk_size}
        y = self.functions.mamba2_chunk_scan(x, time_step, A, B, C, **kwargs)
        if cache is not None:
            y, state = y
            cache.update_recurrent_state(state, layer_idx=self.layer_idx)
        return y.flatten(2)


class BalancedModel:
    """The model is one of Transformers whose mixers are then balanced; this file goes wherever it is saved."""

    def __init__(self, config):
        super().__init__(config)
        balance_modules(self)

    @property
    def _ddp_params_and_buffers_to_ignore(self):  # those without use get no gradient that could be waited for
        unused = [n for n, m in self.named_modules() if isinstance(m, BalancedMixer) and m.reduced_state_size is None]
        return [f"{name}.{projection}" for name in unused for projection in ("B_proj", "C_proj")]

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, BalancedMixer):
            module.initialise_projections()

    @classmethod
    def _can_set_experts_implementation(cls):
        plain = next(kind for kind in cls.__mro__ if kind.__module__.startswith("transformers.models."))
        return plain._can_set_experts_implementation()  # it is read from the source of the class's module

    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        """Save the model as Transformers does, and this file beside it."""
        family = type(self.config).__name__.removesuffix("Config")
        classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
        # One that was loaded from the Hub names its repository there.
        self.config.auto_map = {auto: f"{MODULE}.{family}{kind}" for auto, kind in classes.items()}
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            _copy_this_file(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        _copy_this_file(working_dir)  # save_pretrained(push_to_hub=True) uploads before it returns
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def _copy_this_file(folder):
    copy = os.path.join(folder, f"{MODULE}.py")
    if not os.path.exists(copy) or not os.path.samefile(copy, __file__):
        shutil.copyfile(__file__, copy)


class CompreSSMMamba2Config(BalancedConfig, mamba2.Mamba2Config):
    """The configuration of a Mamba-2 with a balanced state."""

    model_type = "compressm_mamba2"
    state_size_field = "state_size"


class CompreSSMMamba2Mixer(BalancedMixer, mamba2.Mamba2Mixer):
    """The mixer of a Mamba-2 with a balanced state."""

    functions = mamba2


class CompreSSMMamba2Model(BalancedModel, mamba2.Mamba2Model):
    """A Mamba-2 with a balanced state."""

    config: CompreSSMMamba2Config


class CompreSSMMamba2ForCausalLM(BalancedModel, mamba2.Mamba2ForCausalLM, GenerationMixin):
    """The language model over a `CompreSSMMamba2Model`."""

    config: CompreSSMMamba2Config


class CompreSSMBambaConfig(BalancedConfig, bamba.BambaConfig):
    """The configuration of a Bamba with a balanced state."""

    model_type = "compressm_bamba"


class CompreSSMBambaMixer(BalancedMixer, bamba.BambaMixer):
    """The mixer of a Bamba with a balanced state."""

    functions = bamba


class CompreSSMBambaModel(BalancedModel, bamba.BambaModel):
    """A Bamba with a balanced state."""

    config: CompreSSMBambaConfig


class CompreSSMBambaForCausalLM(BalancedModel, bamba.BambaForCausalLM, GenerationMixin):
    """The language model over a `CompreSSMBambaModel`."""

    config: CompreSSMBambaConfig


class CompreSSMFalconH1Config(BalancedConfig, falcon_h1.FalconH1Config):
    """The configuration of a Falcon-H1 with a balanced state."""

    model_type = "compressm_falcon_h1"


class CompreSSMFalconH1Mixer(BalancedMixer, falcon_h1.FalconH1Mixer):
    """The mixer of a Falcon-H1 with a balanced state."""

    functions = falcon_h1

    def _project_input(self, hidden_states: Tensor) -> Tensor:
        return self.in_proj(hidden_states * self.ssm_in_multiplier) * self.mup_vector

    def _gate_output(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.norm(y, gate) if self.mamba_rms_norm else y * nn.functional.silu(gate)


class CompreSSMFalconH1Model(BalancedModel, falcon_h1.FalconH1Model):
    """A Falcon-H1 with a balanced state."""

    config: CompreSSMFalconH1Config

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, BalancedMixer):  # Transformers asks only modules that have tensors
            init.copy_(module.mup_vector, falcon_h1.compute_mup_vector(self.config))


class CompreSSMFalconH1ForCausalLM(BalancedModel, falcon_h1.FalconH1ForCausalLM, GenerationMixin):
    """The language model over a `CompreSSMFalconH1Model`."""

    config: CompreSSMFalconH1Config


class CompreSSMGraniteMoeHybridConfig(BalancedConfig, granitemoehybrid.GraniteMoeHybridConfig):
    """The configuration of a GraniteMoeHybrid with a balanced state."""

    model_type = "compressm_granitemoehybrid"


class CompreSSMGraniteMoeHybridMixer(BalancedMixer, granitemoehybrid.GraniteMoeHybridMambaLayer):
    """The mixer of a GraniteMoeHybrid with a balanced state."""

    functions = granitemoehybrid


class CompreSSMGraniteMoeHybridModel(BalancedModel, granitemoehybrid.GraniteMoeHybridModel):
    """A GraniteMoeHybrid with a balanced state."""

    config: CompreSSMGraniteMoeHybridConfig


class CompreSSMGraniteMoeHybridForCausalLM(
    BalancedModel, granitemoehybrid.GraniteMoeHybridForCausalLM, GenerationMixin
):
    """The language model over a `CompreSSMGraniteMoeHybridModel`."""

    config: CompreSSMGraniteMoeHybridConfig


class CompreSSMNemotronHConfig(BalancedConfig, nemotron_h.NemotronHConfig):
    """The configuration of a Nemotron-H with a balanced state."""

    model_type = "compressm_nemotron_h"
    state_size_field = "ssm_state_size"


class CompreSSMNemotronHMixer(BalancedMixer, nemotron_h.NemotronHMamba2Mixer):
    """The mixer of a Nemotron-H with a balanced state."""

    functions = nemotron_h


class CompreSSMNemotronHModel(BalancedModel, nemotron_h.NemotronHModel):
    """A Nemotron-H with a balanced state."""

    config: CompreSSMNemotronHConfig


class CompreSSMNemotronHForCausalLM(BalancedModel, nemotron_h.NemotronHForCausalLM, GenerationMixin):
    """The language model over a `CompreSSMNemotronHModel`."""

    config: CompreSSMNemotronHConfig


class CompreSSMZamba2Config(BalancedConfig, zamba2.Zamba2Config):
    """The configuration of a Zamba2 with a balanced state."""

    model_type = "compressm_zamba2"


class CompreSSMZamba2Mixer(BalancedMixer, zamba2.Zamba2MambaMixer):
    """The mixer of a Zamba2 with a balanced state."""

    functions = zamba2


class CompreSSMZamba2Model(BalancedModel, zamba2.Zamba2Model):
    """A Zamba2 with a balanced state."""

    config: CompreSSMZamba2Config


class CompreSSMZamba2ForCausalLM(BalancedModel, zamba2.Zamba2ForCausalLM, GenerationMixin):
    """The language model over a `CompreSSMZamba2Model`."""

    config: CompreSSMZamba2Config


# Configurations, mixers and models of Transformers → those of this file that are derived from them, and back.
_KINDS = (BalancedConfig, BalancedMixer, BalancedModel)
BALANCED_CLASSES = {balanced.__bases__[1]: balanced for kind in _KINDS for balanced in kind.__subclasses__()}
PLAIN_CLASSES = {balanced: plain for plain, balanced in BALANCED_CLASSES.items()}

for plain, balanced in BALANCED_CLASSES.items():  # files name the weights as those of the plain models do
    if issubclass(balanced, BalancedConfig) and (mapping := get_checkpoint_conversion_mapping(plain.model_type)):
        register_checkpoint_conversion_mapping(balanced.model_type, mapping, overwrite=True)


def balance_modules(model: PreTrainedModel) -> None:
    """Turn a model of Transformers, in place, into the one of this file that computes the same.

    The mixers get their projections: identities that are not used, or what `config.balanced_state_size` says.

    Raises:
        ValueError: the model's class has no counterpart here, or hooks hold the `forward` of its mixers.
    """
    _change_classes(model, BALANCED_CLASSES)
    sizes = model.config.reduced_state_sizes()
    for mixer in model.modules():
        if isinstance(mixer, BalancedMixer) and not hasattr(mixer, "B_proj"):
            mixer.add_projections(sizes[mixer.layer_idx])


def _change_classes(model, classes):
    if type(model) not in classes.keys() | set(classes.values()):
        allowed = ", ".join(plain.__name__ for plain in classes if issubclass(plain, PreTrainedModel))
        raise ValueError(f"the model is a {type(model).__name__}, expected one of {allowed}.")
    changed = [module for module in model.modules() if type(module) in classes]
    if any("forward" in vars(module) for module in changed if not isinstance(module, PreTrainedModel)):
        raise ValueError("hooks (of a device_map?) hold the `forward` of mixers: balance first, and dispatch then.")
    for module in changed:
        module.__class__ = classes[type(module)]
    if type(model.config) in classes:
        model.config.__class__ = classes[type(model.config)]
        vars(model.config).pop("auto_map", None)
        if "model_type" in vars(model.config):  # one that was loaded has it
            model.config.model_type = type(model.config).model_type


__all__ = [balanced.__name__ for balanced in PLAIN_CLASSES] + ["balance_modules"]
