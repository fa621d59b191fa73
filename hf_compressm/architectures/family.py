"""Where the state axis sits in a model: data, one entry for each supported `model_type`."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

STATE_INPUT, STATE_OUTPUT, STATE = "B", "C", "state"
STATE_BLOCKS = (STATE_INPUT, STATE_OUTPUT, STATE)  # one entry per state; other blocks name an attribute of the mixer


@dataclass(frozen=True)
class StateTensor:
    """A tensor of the mixer with a state axis: the axis, and the blocks that lie along it, in order."""

    axis: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class StateLayout:
    """How one architecture stores its state.

    Attributes:
        mixer_class: name of the module that owns the state; it has a `layer_idx` and a `config`.
        tensors: path of each parameter within the mixer → its state axis.
        size_attribute: the mixer's attribute that holds N.
        size_field: the config's field that holds N.
        per_layer_by_default: whether a reduction gives each layer a size of its own, unless it is told otherwise.
    """

    mixer_class: str
    tensors: dict[str, StateTensor]
    size_attribute: str
    size_field: str
    per_layer_by_default: bool

    @property
    def marker(self) -> str:
        """Path of a parameter that has an entry per state and nothing else on its state axis."""
        return next(path for path, tensor in self.tensors.items() if tensor.blocks == (STATE,))


@dataclass(frozen=True)
class SelectiveLayout(StateLayout):
    """A selective (time-varying) layer: states are kept or dropped as they are.

    Attributes:
        projection: path of the parameter whose blocks are the maps B and C.
        decay: path of the parameter that holds log(-A), (D, N).
        output_projection: path of the weight that mixes the D channels, (hidden, D).
    """

    projection: str
    decay: str
    output_projection: str


@dataclass(frozen=True)
class TimeInvariantLayout(StateLayout):
    """A diagonal time-invariant layer: its mixer offers `system()` and `parameters_of(eigenvalues, B, C)`."""


MAMBA = SelectiveLayout(
    mixer_class="MambaMixer",
    tensors={
        "x_proj.weight": StateTensor(axis=0, blocks=("time_step_rank", STATE_INPUT, STATE_OUTPUT)),
        "A_log": StateTensor(axis=1, blocks=(STATE,)),
    },
    projection="x_proj.weight",
    decay="A_log",
    output_projection="out_proj.weight",
    size_attribute="ssm_state_size",
    size_field="state_size",
    per_layer_by_default=False,
)
LAYOUTS = {
    "mamba": MAMBA,
    "compressm_mamba": replace(MAMBA, per_layer_by_default=True),
    "lru": TimeInvariantLayout(
        mixer_class="LRUMixer",
        tensors={
            "nu_log": StateTensor(axis=0, blocks=(STATE,)),
            "theta_log": StateTensor(axis=0, blocks=(STATE,)),
            "gamma_log": StateTensor(axis=0, blocks=(STATE,)),
            "B": StateTensor(axis=0, blocks=(STATE,)),
            "C": StateTensor(axis=1, blocks=(STATE,)),
        },
        size_attribute="state_size",
        size_field="state_size",
        per_layer_by_default=True,
    ),
}

UNSUPPORTED = {
    "falcon_mamba": "it normalises B and C over the state, so a masked state is not inert",
    "mamba2": "its state is shared within heads and groups",
    **dict.fromkeys(
        ("bamba", "falcon_h1", "granitemoehybrid", "jamba", "nemotron_h", "zamba", "zamba2"),
        "hybrids of attention and state space layers are not handled yet",
    ),
}


def layout_of(model: nn.Module) -> StateLayout:
    """The layout of an unwrapped Transformers model.

    Raises:
        ValueError: an architecture that is refused or unknown; the message lists the known ones.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type in LAYOUTS:
        return LAYOUTS[model_type]
    reason = UNSUPPORTED.get(model_type, "it is not known to have a state that can be resized")
    raise ValueError(
        f"cannot resize the state of model type '{model_type}': {reason}. Supported: {', '.join(LAYOUTS)}."
    )


def state_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The mixers of an unwrapped model by layer index, checked.

    Raises:
        ValueError: no layer has a state, a mixer's tensors do not have the sizes it claims, or its projection is not
            a plain linear layer (an adapter or a quantised layer in its place).
    """
    layout, mixers = layout_of(model), mixers_of(model)
    if not mixers:
        raise ValueError(f"{type(model).__name__} has no {layout.mixer_class}: there is no state to resize.")
    for index, mixer in mixers.items():
        _check_mixer(mixer, layout, index)
    return mixers


def mixers_of(model: nn.Module) -> dict[int, nn.Module]:
    """The mixers of an unwrapped model by layer index, even while they do not have the sizes they claim."""
    layout = layout_of(model)
    # FSDP2 derives a class of its own from that of every module that it wraps.
    names = (layout.mixer_class, f"FSDP{layout.mixer_class}")
    mixers = {module.layer_idx: module for module in model.modules() if type(module).__name__ in names}
    return dict(sorted(mixers.items()))


def state_size(mixer: nn.Module, layout: StateLayout) -> int:
    """N of one layer."""
    return getattr(mixer, layout.size_attribute)


def state_sizes(model: nn.Module) -> dict[int, int]:
    """N by layer index."""
    layout = layout_of(model)
    return {index: state_size(mixer, layout) for index, mixer in state_layers(model).items()}


def projection_module(mixer: nn.Module, layout: SelectiveLayout) -> nn.Module:
    """The module that owns the projection."""
    return mixer.get_submodule(layout.projection.rpartition(".")[0])


def projection_rows(mixer: nn.Module, layout: SelectiveLayout, block: str, size: int | None = None) -> slice:
    """The rows of the projection that make `block` (`STATE_INPUT`: B, `STATE_OUTPUT`: C), at N = `size` if given."""
    start = 0
    for name in layout.tensors[layout.projection].blocks:
        length = _block_length(mixer, layout, name, size)
        if name == block:
            return slice(start, start + length)
        start += length
    raise KeyError(block)


def axis_length(mixer: nn.Module, layout: StateLayout, tensor: StateTensor, size: int | None = None) -> int:
    """Entries that a tensor has on its state axis, at N = `size` if given."""
    return sum(_block_length(mixer, layout, block, size) for block in tensor.blocks)


def state_size_of(length: int, mixer: nn.Module, layout: StateLayout, tensor: StateTensor) -> int:
    """The N at which a tensor has `length` entries on its state axis."""
    fixed = axis_length(mixer, layout, tensor, size=0)
    return (length - fixed) // (axis_length(mixer, layout, tensor, size=1) - fixed)


def source_index(mixer: nn.Module, layout: StateLayout, tensor: StateTensor, source: Tensor) -> Tensor:
    """Positions along the tensor's state axis that a resize to the states `source` takes, -1 where a state is new.

    Args:
        source: for each state after the resize the one it comes from, or -1, (N',).
    """
    positions, start = [], 0
    for name in tensor.blocks:
        length = _block_length(mixer, layout, name)
        entries = source if name in STATE_BLOCKS else torch.arange(length, device=source.device)
        positions.append(torch.where(entries < 0, -1, start + entries))
        start += length
    return torch.cat(positions)


def _block_length(mixer: nn.Module, layout: StateLayout, block: str, size: int | None = None) -> int:
    if block in STATE_BLOCKS:
        return state_size(mixer, layout) if size is None else size
    return getattr(mixer, block)


def _check_mixer(mixer: nn.Module, layout: StateLayout, index: int) -> None:
    if isinstance(layout, SelectiveLayout) and not _is_plain_linear(projection_module(mixer, layout)):
        raise ValueError(
            f"layer {index}: {layout.projection} belongs to a {type(projection_module(mixer, layout)).__name__}, "
            "expected a plain nn.Linear. Merge adapters or dequantise first."
        )
    for path, tensor in layout.tensors.items():
        given = mixer.get_parameter(path).shape[tensor.axis]
        expected = axis_length(mixer, layout, tensor)
        if given != expected:
            raise ValueError(
                f"layer {index}: {path} has {given} entries on its state axis, but state_size = "
                f"{state_size(mixer, layout)} asks for {expected}; the model's weights and config disagree."
            )


def _is_plain_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "FSDPLinear"
