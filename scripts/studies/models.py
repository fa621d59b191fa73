"""These functions make the models of the studies, and start parts of them anew."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.architectures import StateLayers, state_layers, state_sizes

SIZE_FIELDS = {"bamba": "mamba_d_state"}  # of N, where it is not state_size
ROWS = ("random", "balanced")  # of projections at the start
AFRESH = ("decay rates", "maps", "moments", "projections")  # A_log, B and C, what the optimizer remembers, W and V


def model_of(architecture: dict, state_size: int, map_scale: float = 1.0) -> PreTrainedModel:
    """Return a new model; of Mamba-1 if `architecture` names no `model_type`.

    Args:
        map_scale: what the initial weights of B and C of a Mamba-2 are multiplied by.
    """
    model_type = architecture.get("model_type", "mamba")
    options = architecture | {"model_type": model_type, SIZE_FIELDS.get(model_type, "state_size"): state_size}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options))
    if map_scale != 1:
        layers = state_layers(model)
        for mixer in layers.values():
            for rows in rows_of_maps(layers, mixer):
                rows.mul_(map_scale)
    return model


@torch.no_grad()
def project(model: nn.Module, size: int, rows: str, batches: list[dict], seed: int) -> None:
    """Make a Mamba-2 one with balanced layers of `size` = r states, in place.

    Args:
        rows: of the projections: "balanced", as a cut on these batches gives them, or "random" and orthonormal.
        batches: what the layers are analysed on.
    """
    full = max(state_sizes(model).values())
    config = CompreSSMConfig(target_state_size=size, basis="balanced", calibration_batches=len(batches))
    compress(model, analyze(model, batches, config))
    if rows == "random":
        generator = torch.Generator().manual_seed(seed)
        for mixer in state_layers(model).values():
            put_random_projections(mixer, size, full, generator)


def reductions(
    model: nn.Module, sizes: Iterable[int], ways: dict[str, dict], batches: list[dict], measure
) -> list[dict]:
    """Return what a trained model can do once it is reduced to each size in each way; it stays as it is.

    Args:
        ways: name → options of CompreSSMConfig.
        batches: what the model is analysed on.
        measure: model → numbers by name.
    """
    found = []
    for size in sizes:
        for way, options in ways.items():
            config = CompreSSMConfig(**{"target_state_size": size, "calibration_batches": len(batches)} | options)
            smaller = copy.deepcopy(model)
            compress(smaller, analyze(smaller, batches, config))
            found.append({"state_size": size, "way": way} | measure(smaller))
    return found


@torch.no_grad()
def start_afresh(model: nn.Module, parts: tuple[str, ...], optimizer: Optimizer, generator: torch.Generator) -> None:
    """Start these parts, of `AFRESH`, anew, as a new model of the size would have them."""
    layers, std = state_layers(model), model.config.initializer_range
    for mixer in layers.values():
        if "decay rates" in parts:  # 1 … N for each channel, or 1 … H for the heads of a Mamba-2
            mixer.A_log.copy_(torch.arange(1, mixer.A_log.shape[-1] + 1).log().expand_as(mixer.A_log))
        if "maps" in parts:
            for rows in rows_of_maps(layers, mixer):
                rows.copy_(torch.empty(rows.shape).normal_(0, std, generator=generator))
        if "projections" in parts and hasattr(mixer, "B_proj"):
            put_random_projections(mixer, *mixer.B_proj.shape[1:], generator)
    if "moments" in parts:
        optimizer.state.clear()


def rows_of_maps(layers: StateLayers, mixer: nn.Module) -> list[torch.Tensor]:
    """Return views of the weights that make B and C, (entries, features) each."""
    family = getattr(layers.family, "plain", layers.family)  # the projections of balanced layers are another matter
    path = next(path for path in family.paths(mixer) if path.endswith("_proj.weight"))
    weight = mixer.get_parameter(path).detach()
    return [weight[family.block_slice(mixer, path, name)] for name in ("B", "C")]


def put_random_projections(mixer: nn.Module, size: int, full: int, generator: torch.Generator) -> None:
    """Give a balanced layer the same random orthonormal rows, (G, r, N), for B and C: a subspace of its features."""
    columns = torch.randn(mixer.n_groups, full, size, generator=generator)
    rows = torch.linalg.qr(columns).Q.mT
    mixer.B_proj.copy_(rows)
    mixer.C_proj.copy_(rows)
