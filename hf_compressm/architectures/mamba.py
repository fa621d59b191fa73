"""The family of Mamba-1 serves models with one state size for all layers, or with one for each.

While all its layers have one size, a Mamba is a plain `MambaForCausalLM`, which every tool loads; otherwise it is a
`CompreSSMMambaForCausalLM`. It changes its class in place, so that engines and optimizers keep their model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, MambaModel
from transformers.models.mamba.modeling_mamba import MambaBlock

from ..engines import change_class, full_tensor, original_class
from ..kernels import selective_scan
from ..theory.selective import LayerInputs, StateMaps
from .family import Block, Observer, SelectiveFamily, StateTensor
from .mamba_scan import observed_scan, reference_loop_would_run
from .per_layer import CompreSSMMambaConfig, CompreSSMMambaForCausalLM, CompreSSMMambaModel

PER_LAYER_CLASSES = {MambaForCausalLM: CompreSSMMambaForCausalLM, MambaModel: CompreSSMMambaModel}
PLAIN_CLASSES = {per_layer: plain for plain, per_layer in PER_LAYER_CLASSES.items()}


class MambaFamily(SelectiveFamily):
    """In a Mamba (arXiv 2312.00752) B and C are linear in the layer's input, and A differs between channels."""

    model_types = ("mamba", "compressm_mamba")
    mixer_class = "MambaMixer"
    size_attribute = "ssm_state_size"
    tensors = {  # noqa: RUF012
        "x_proj.weight": StateTensor(axis=0, blocks=(Block("time_step_rank", per_state=0), Block("B"), Block("C"))),
        "A_log": StateTensor(axis=1),
    }
    decay = "A_log"
    output_projection = "out_proj.weight"
    title = "Mamba"
    limits = (
        "The reduction is axis-aligned (a state is dropped for all channels of a layer at once), and selective layers "
        "have no error bound: the measured losses above take its place. The singular values are those of a "
        "time-invariant surrogate of each layer."
    )

    def check_mixer(self, mixer: nn.Module, index: int) -> None:
        """Refuse what the base class refuses, an `x_proj` that is no plain linear layer, and a packed `out_proj`.

        Raises:
            ValueError: `x_proj` is of another class, the weight of `out_proj` is no parameter, or a tensor does not
                have the size that the mixer states.
        """
        is_plain = {
            "x_proj": type(mixer.x_proj) is nn.Linear or type(mixer.x_proj).__name__ == "FSDPLinear",
            "out_proj": isinstance(mixer.out_proj.weight, nn.Parameter),
        }
        for name, plain in is_plain.items():
            if not plain:
                given = type(getattr(mixer, name))
                raise ValueError(
                    f"layer {index}: {name}.weight belongs to a {given.__module__}.{given.__qualname__}, expected a "
                    "plain nn.Linear. Merge adapters first, and quantise after the cut."
                )
        super().check_mixer(mixer, index)

    def is_per_layer(self, model: nn.Module) -> bool:
        """Return True for a model whose layers differ already; any other stays one that every tool loads."""
        return isinstance(model.config, CompreSSMMambaConfig)

    def check_per_layer(self, model: nn.Module) -> None:
        """Refuse a class that the user derived from Mamba's, since it has no counterpart with a size for each layer.

        Raises:
            ValueError: the model is of such a class.
        """
        own = original_class(model)
        if not self.is_per_layer(model) and own not in PER_LAYER_CLASSES:
            raise ValueError(
                f"layers of a {own.__name__} would have state sizes of their own; allowed in a "
                f"{' or '.join(plain.__name__ for plain in PER_LAYER_CLASSES)} itself. Set allocation='uniform'."
            )

    def record_in_mixer(self, mixer: nn.Module, size: int) -> None:
        """Update N in the mixer, and the number of outputs that its projection states."""
        super().record_in_mixer(mixer, size)
        mixer.x_proj.out_features = mixer.x_proj.weight.shape[0]

    def record_in_model(self, model: nn.Module, sizes: dict[int, int]) -> None:
        """Update the class and the config of a model, and give blocks and mixers the config of their own layer."""
        config, is_uniform = model.config, len(set(sizes.values())) == 1
        if original_class(model) in PER_LAYER_CLASSES | PLAIN_CLASSES:
            _change_classes(model, is_uniform)
        config.per_layer_config = None
        config.state_size = max(sizes.values())
        if not is_uniform and self.is_per_layer(model):
            config.per_layer_config = {index: {"state_size": size} for index, size in sizes.items()}
        for block in (module for module in model.modules() if isinstance(module, MambaBlock)):
            block.config = block.mixer.config = config.per_layer_config[block.layer_idx]

    def maps(self, tensors: Mapping[str, Tensor], mixer: nn.Module, size: int | None = None) -> StateMaps:
        """Return the rows of `x_proj.weight` that make B and C, and `A_log`, as views."""
        projection = tensors["x_proj.weight"]
        B, C = (self.block_slice(mixer, "x_proj.weight", name, size) for name in ("B", "C"))
        return StateMaps(projection[B], projection[C], tensors["A_log"])

    def observed_scan(self, observer: Observer) -> AbstractContextManager[None]:
        """Return a context manager that replaces the scan that Transformers' layers call by the observer."""
        return observed_scan(observer)

    def layer_output(self, mixer: nn.Module) -> Callable[[StateMaps, LayerInputs], Tensor]:
        """Return a function that computes W_out (silu(z) ⊙ y), where y is the scan without the skip connection D u."""
        projection = full_tensor(mixer.out_proj.weight.detach())

        def output(maps: StateMaps, inputs: LayerInputs) -> Tensor:
            with torch.autocast(inputs.u.device.type, enabled=False):
                u, time_step = inputs.u.to(maps.A_log), inputs.time_step.to(maps.A_log)
                B, C = (torch.einsum("nd,bdl->bnl", rows, u) for rows in (maps.B_rows, maps.C_rows))
                y = selective_scan(u, time_step, -maps.A_log.exp(), B, C)
                y = y if inputs.gate is None else y * F.silu(inputs.gate.to(y))
                return torch.einsum("hd,bdl->bhl", projection.to(y), y)

        return output

    def initialise(self, mixer: nn.Module, new: dict[str, Tensor], size: int, generator) -> None:
        """Draw rows of B as the initialiser does, leave rows of C at zero, and continue the decay rates -1, -2, …"""
        old_size, maps = self.state_size(mixer), self.maps(new, mixer, size)
        rows = maps.B_rows[old_size:]
        rows.copy_(torch.empty(rows.shape).normal_(0, mixer.config.initializer_range, generator=generator))
        maps.A_log[:, old_size:] = torch.arange(old_size + 1, size + 1).log().to(maps.A_log)

    def undecayed(self, mixer: nn.Module) -> Iterator[nn.Parameter]:
        """Yield `A_log`: weight decay would pull all decay rates together, and bias the scores with them."""
        yield mixer.A_log

    def slow_scan(self, device_type: str) -> str | None:
        """Return a warning where Transformers' own loop would run, which is quadratic in the sequence length."""
        if not reference_loop_would_run(device_type):
            return None
        return (
            "Transformers' own Mamba loop is about to run: its training step is quadratic in the sequence length. "
            "Call hf_compressm.install_scan() before training, or install mamba-ssm on a GPU."
        )

    def values_per_state(self, config: Mapping) -> int:
        """Return the number of channels: each has one number for each state."""
        return config["intermediate_size"]


def _change_classes(model: nn.Module, is_uniform: bool) -> None:
    classes = PLAIN_CLASSES if is_uniform else PER_LAYER_CLASSES
    for module in model.modules():
        if original_class(module) in classes:
            change_class(module, classes[original_class(module)])
    model.config.__class__ = MambaConfig if is_uniform else CompreSSMMambaConfig
    for name in ("auto_map", "model_type"):  # a config that was loaded has a model_type of its own
        vars(model.config).pop(name, None)


MAMBA = MambaFamily()
