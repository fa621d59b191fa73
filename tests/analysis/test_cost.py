"""What an analysis is said to take, from a config alone, is what it takes."""

import pytest
import torch
from conftest import LENGTH, build_model
from scalar_decay_models import build_scalar_decay
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMConfig, analyze
from hf_compressm.analysis.activations import collect_statistics, layer_inputs
from hf_compressm.analysis.cost import analysis_cost
from hf_compressm.analysis.group_statistics import collect_group_statistics, group_layer_inputs
from hf_compressm.architectures import state_layers
from hf_compressm.architectures.scalar_decay.family import ScalarDecayFamily

BATCH = 8  # sequences in each of the fixture's batches
MODELS = {"mamba": build_model, "mamba2": build_scalar_decay}
MODELS |= {name: lambda name=name: build_scalar_decay(model_type=name) for name in ("bamba", "compressm_falcon_h1")}


def held_bytes(value) -> int:
    """Return the bytes of all that a tuple, or an object with attributes, keeps from being freed."""
    parts, storages = [value], {}
    while parts:
        part = parts.pop()
        if isinstance(part, torch.Tensor):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        elif part is not None and not isinstance(part, str | int | float):
            parts += part if isinstance(part, list | tuple) else vars(part).values()
    return sum(storages.values())


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_that_of_what_is_held(batches, name):
    model, config = MODELS[name]().eval(), CompreSSMConfig(target_state_size=4, refit=True, calibration_batches=6)
    layers = state_layers(model)
    is_scalar_decay = isinstance(layers.family, ScalarDecayFamily)
    collect, inputs_of = (collect_statistics, layer_inputs)
    if is_scalar_decay:
        collect, inputs_of = (collect_group_statistics, group_layer_inputs)
    with torch.no_grad():
        statistics = collect(layers, batches[:1])
        inputs = inputs_of(layers, batches[:4], next(iter(layers)), {})
    cost = analysis_cost(layers, config, BATCH, LENGTH)
    assert cost.parameters == model.num_parameters()
    assert cost.statistics == sum(map(held_bytes, statistics.values()))
    targets = 4 * BATCH * LENGTH * model.config.hidden_size * 4
    assert cost.refit == pytest.approx(held_bytes(inputs) + targets, rel=0.2)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_the_model_runs_as_often_as_was_said(batches, name, refit):
    model, config = MODELS[name](), CompreSSMConfig(target_state_size=4, refit=refit, calibration_batches=6)
    cost, tokens = analysis_cost(state_layers(model), config, BATCH, LENGTH), []
    embedded = model.get_input_embeddings().register_forward_hook(lambda *given: tokens.append(given[1][0].numel()))
    analyze(model, batches, config)
    embedded.remove()
    assert cost.passes + cost.refit_passes == pytest.approx(sum(tokens) / (BATCH * LENGTH), abs=3)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_weights_gives_the_same(name):
    model, config = MODELS[name](), CompreSSMConfig(target_state_size=4, calibration_batches=8)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    of_both = [analysis_cost(state_layers(some), config, 2, 64) for some in (model, empty)]
    assert of_both[0] == of_both[1]
    text = str(of_both[0])
    assert f"{model.num_parameters():,} parameters" in text and "8 batches of 128 tokens" in text
