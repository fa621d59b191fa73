"""These are the layers that the format of `mamba_ssm` knows, beside those of Transformers that compute the same.

The facts are those of mamba_ssm 2.3.2: the arguments of its `Mamba` and `Mamba2` with their defaults, which `ssm_cfg`
holds, and the names and shapes of their tensors.
"""

from abc import ABC, abstractmethod

from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedConfig

Shapes = dict[str, tuple[int, ...]]


class LayerFormat(ABC):
    """A layer format translates what `ssm_cfg` says of one kind of layer into a config of Transformers, and back.

    Attributes:
        name: `ssm_cfg["layer"]`.
        title: what a message calls the kind.
        model_class, config_class: those of Transformers.
        defaults: the arguments of the layer, with their defaults.
        initialiser_fields: further ones, which say how new weights are drawn.
        readable: those that Transformers does not have, with the values that it computes with.
        writable: fields of Transformers' config that mamba_ssm does not have, with the values that it computes with.
    """

    name: str
    title: str
    model_class: type
    config_class: type
    defaults: dict[str, object]
    initialiser_fields: frozenset[str]
    readable: dict[str, object]
    writable: dict[str, tuple]

    @abstractmethod
    def resolve(self, given: dict, d_model: int) -> tuple[dict, dict]:
        """Return what is given and the defaults, where those are resolved that depend on the size of the model."""

    @abstractmethod
    def to_transformers(self, ssm: dict, d_model: int) -> dict:
        """Return the fields of Transformers' config that a complete `ssm_cfg` says.

        Raises:
            ValueError: values do not fit each other.
        """

    @abstractmethod
    def to_original(self, config: PreTrainedConfig) -> dict:
        """Return `ssm_cfg` for a config of Transformers."""

    @abstractmethod
    def shapes(self, config: PreTrainedConfig) -> Shapes:
        """Return the shapes of the tensors of a mixer by their names."""


class Mamba1Format(LayerFormat):
    """The layer of Mamba, arXiv 2312.00752."""

    name, title, model_class, config_class = "Mamba1", "Mamba-1", MambaForCausalLM, MambaConfig
    defaults = {  # noqa: RUF012
        "layer": "Mamba1",
        "d_state": 16,
        "d_conv": 4,
        "expand": 2,
        "dt_rank": "auto",
        "conv_bias": True,
        "bias": False,
        "use_fast_path": True,
    }
    initialiser_fields = frozenset({"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"})
    readable = {}  # noqa: RUF012
    writable = {"layer_norm_epsilon": (1e-5,), "hidden_act": ("silu", "swish")}  # noqa: RUF012

    def resolve(self, given: dict, d_model: int) -> tuple[dict, dict]:
        """Return both with a number in the place of the rank "auto"."""
        rank = -(-d_model // 16)  # rounded up
        if given.get("dt_rank") == self.defaults["dt_rank"]:
            given = given | {"dt_rank": rank}
        return given, self.defaults | {"dt_rank": rank}

    def to_transformers(self, ssm: dict, d_model: int) -> dict:
        """Return the sizes, under Transformers' names."""
        return {
            "state_size": ssm["d_state"],
            "conv_kernel": ssm["d_conv"],
            "expand": ssm["expand"],
            "time_step_rank": ssm["dt_rank"],
            "use_conv_bias": ssm["conv_bias"],
            "use_bias": ssm["bias"],
        }

    def to_original(self, config: MambaConfig) -> dict:
        """Return the sizes, under mamba_ssm's names."""
        return {
            "d_state": config.state_size,
            "d_conv": config.conv_kernel,
            "expand": config.expand,
            "dt_rank": int(config.time_step_rank),
            "conv_bias": config.use_conv_bias,
            "bias": config.use_bias,
        }

    def shapes(self, config: MambaConfig) -> Shapes:
        """Return the shapes of the projections, the convolution, log(-A) and D."""
        hidden, inner, rank = config.hidden_size, config.intermediate_size, int(config.time_step_rank)
        shapes = {
            "in_proj.weight": (2 * inner, hidden),
            "conv1d.weight": (inner, 1, config.conv_kernel),
            "x_proj.weight": (rank + 2 * config.state_size, inner),
            "dt_proj.weight": (inner, rank),
            "dt_proj.bias": (inner,),
            "A_log": (inner, config.state_size),
            "D": (inner,),
            "out_proj.weight": (hidden, inner),
        }
        return shapes | _biases(config, in_proj=2 * inner, conv1d=inner, out_proj=hidden)


class Mamba2Format(LayerFormat):
    """The layer of Mamba-2, arXiv 2405.21060."""

    name, title, model_class, config_class = "Mamba2", "Mamba-2", Mamba2ForCausalLM, Mamba2Config
    defaults = {  # noqa: RUF012
        "layer": "Mamba2",
        "d_state": 128,
        "d_conv": 4,
        "expand": 2,
        "headdim": 64,
        "d_ssm": None,
        "ngroups": 1,
        "D_has_hdim": False,
        "rmsnorm": True,
        "norm_before_gate": False,
        "dt_limit": [0.0, float("inf")],
        "bias": False,
        "conv_bias": True,
        "chunk_size": 256,
        "use_mem_eff_path": True,
    }
    initialiser_fields = frozenset({"conv_init", "A_init_range", "dt_min", "dt_max", "dt_init_floor"})
    readable = {"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}  # noqa: RUF012
    writable = {"layer_norm_epsilon": (1e-5,), "hidden_act": ("silu", "swish")}  # noqa: RUF012

    def resolve(self, given: dict, d_model: int) -> tuple[dict, dict]:
        """Return both with a number in the place of None, which lets the scan run over all channels."""
        expand = given.get("expand")
        inner = d_model * (expand if type(expand) is int else self.defaults["expand"])
        given = {name: value for name, value in given.items() if (name, value) != ("d_ssm", None)}
        return given, self.defaults | {"d_ssm": inner}

    def to_transformers(self, ssm: dict, d_model: int) -> dict:
        """Return the sizes, under Transformers' names."""
        inner, head_dim, groups, limit = ssm["expand"] * d_model, ssm["headdim"], ssm["ngroups"], ssm["dt_limit"]
        if ssm["d_ssm"] != inner:
            raise ValueError(f"d_ssm = {ssm['d_ssm']}, but Transformers' Mamba2 scans all {inner} channels")
        if inner % head_dim or (inner // head_dim) % groups:
            raise ValueError(
                f"{inner} channels cannot be heads of headdim = {head_dim} in ngroups = {groups} groups of equal size"
            )
        if [type(bound) in (int, float) for bound in limit] != [True, True] or not 0 <= limit[0] <= limit[1]:
            raise ValueError(f"dt_limit = {limit}, expected two numbers, the smaller one first")
        return {
            "state_size": ssm["d_state"],
            "conv_kernel": ssm["d_conv"],
            "expand": ssm["expand"],
            "head_dim": head_dim,
            "num_heads": inner // head_dim,
            "n_groups": groups,
            "time_step_limit": [float(bound) for bound in limit],
            "chunk_size": ssm["chunk_size"],
            "use_conv_bias": ssm["conv_bias"],
            "use_bias": ssm["bias"],
        }

    def to_original(self, config: Mamba2Config) -> dict:
        """Return the sizes, under mamba_ssm's names."""
        return {
            "layer": self.name,
            "d_state": config.state_size,
            "d_conv": config.conv_kernel,
            "expand": config.expand,
            "headdim": config.head_dim,
            "ngroups": config.n_groups,
            "rmsnorm": True,
            "norm_before_gate": False,
            "dt_limit": list(config.time_step_limit),
            "conv_bias": config.use_conv_bias,
            "bias": config.use_bias,
            "chunk_size": config.chunk_size,
        }

    def shapes(self, config: Mamba2Config) -> Shapes:
        """Return the shapes of the projections, the convolution, the norm, and what each head has."""
        hidden, heads = config.hidden_size, config.num_heads
        inner = heads * config.head_dim
        channels = inner + 2 * config.n_groups * config.state_size
        shapes = {
            "in_proj.weight": (inner + channels + heads, hidden),
            "conv1d.weight": (channels, 1, config.conv_kernel),
            "dt_bias": (heads,),
            "A_log": (heads,),
            "D": (heads,),
            "norm.weight": (inner,),
            "out_proj.weight": (hidden, inner),
        }
        return shapes | _biases(config, in_proj=inner + channels + heads, conv1d=channels, out_proj=hidden)


def _biases(config: PreTrainedConfig, in_proj: int, conv1d: int, out_proj: int) -> Shapes:
    """Return the shapes of the biases that a layer of this config has."""
    shapes = {"conv1d.bias": (conv1d,)} if config.use_conv_bias else {}
    if config.use_bias:
        shapes |= {"in_proj.bias": (in_proj,), "out_proj.bias": (out_proj,)}
    return shapes


LAYER_FORMATS: dict[str, LayerFormat] = {layer.name: layer for layer in (Mamba1Format(), Mamba2Format())}
