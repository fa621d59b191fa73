"""What the library promises for each family, with one case a family."""

from functools import partial

import pytest
import torch
from conftest import (
    assert_identical,
    build_lru,
    build_model,
    build_trainer,
    from_origin,
    losses_of,
    train_steps,
    weights_of,
)
from mamba1_models import build_falcon_mamba, build_jamba, build_zamba
from scalar_decay_models import CONFIGS, build_scalar_decay
from toy_family import toy_registered  # noqa: F401, a fixture
from toy_ssm import ToyConfig, ToyForCausalLM
from transformers import set_seed

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, analyze, compress, parameter_groups
from hf_compressm.architectures import registry, state_layers, state_sizes
from hf_compressm.architectures.selective.per_layer import CompreSSMMambaConfig, CompreSSMMambaForCausalLM
from hf_compressm.storage.checkpoint import check_checkpoint


@from_origin
def build_per_layer(seed: int) -> CompreSSMMambaForCausalLM:
    set_seed(seed)
    sizes = {"per_layer_config": {0: {"state_size": 16}, 1: {"state_size": 12}}, "state_size": 16}
    return CompreSSMMambaForCausalLM(
        CompreSSMMambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, **sizes)
    )


@from_origin
def build_toy(seed: int) -> ToyForCausalLM:
    set_seed(seed)
    return ToyForCausalLM(ToyConfig())


pytestmark = pytest.mark.usefixtures("toy_registered")

# The one parameter that a new architecture adds: model type → what builds a small model of 512 tokens.
CASES = {
    "mamba": build_model,
    "compressm_mamba": build_per_layer,
    "falcon_mamba": build_falcon_mamba,
    "jamba": build_jamba,
    "zamba": build_zamba,
    "lru": build_lru,
    "toy_ssm": build_toy,
}
SCALAR_DECAY = [*CONFIGS, *(f"compressm_{model_type}" for model_type in CONFIGS)]
CASES |= {model_type: partial(build_scalar_decay, model_type=model_type) for model_type in SCALAR_DECAY}


# Models are trained in float32, and may be reduced in bfloat16 afterwards.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])


@pytest.fixture
def model(model_type):
    return CASES[model_type]()


@pytest.fixture
def data(model, batches, lru_batches):
    return batches if registry.family_of(model).is_language_model else lru_batches


def optimizer_of(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3)


def test_no_family_is_without_a_case():
    assert set(CASES) == set(registry.FAMILIES)


@pytest.mark.parametrize("model_type", CASES)
def test_it_says_of_its_layers_what_they_are(model):
    layers = state_layers(model)
    assert layers.family.layers_of_config(model.config.to_dict()) == list(layers)
    for index, mixer in layers.items():
        assert mixer.layer_idx == index and layers.family.state_size(mixer) == layers.sizes[index]
        for path, parameter in layers.parameters(index).items():
            assert model.get_parameter(layers.parameter_name(index, path)) is parameter
            axis = layers.family.tensors[path].axis
            assert layers.family.size_at(mixer, path, parameter.shape[axis]) == layers.sizes[index]


@pytest.mark.parametrize("model_type", CASES)
def test_a_cut_computes_what_was_measured_and_the_optimizer_goes_on(model, data):
    optimizer = optimizer_of(model)
    train_steps(model, optimizer, data)
    report = analyze(model, data, CompreSSMConfig(target_state_size=5))
    event = compress(model, report, optimizer)
    assert set(state_sizes(model).values()) == {5} and event.layers == list(report.plan)
    held_out = data[1:4:2] if registry.family_of(model).needs_data else data[:4]
    counts = [(batch["labels"][:, 1:] if batch["labels"].ndim > 1 else batch["labels"]).numel() for batch in held_out]
    with torch.no_grad():
        losses = [model.eval()(**batch).loss.item() for batch in held_out]
    measured = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert measured == pytest.approx(report.loss_after, abs=2e-5)
    before = weights_of(model)
    train_steps(model, optimizer, data[:1])
    layers = state_layers(model)
    for index in layers:
        for path, parameter in layers.parameters(index).items():
            assert not torch.equal(before[layers.parameter_name(index, path)], parameter), path


@DTYPES
@pytest.mark.parametrize("model_type", CASES)
def test_a_cut_model_is_saved_checked_and_loaded(model, dtype, data, tmp_path):
    model.to(dtype).save_pretrained(tmp_path / "whole")
    model = type(model).from_pretrained(tmp_path / "whole")
    compress(model, analyze(model, data, CompreSSMConfig(target_state_size=5)))
    model.save_pretrained(tmp_path / "cut")
    loaded = type(model).from_pretrained(tmp_path / "cut")
    assert check_checkpoint(tmp_path / "cut") == state_sizes(model) == state_sizes(loaded)
    assert loaded.dtype == dtype
    assert_identical(weights_of(loaded), weights_of(model))
    ids = data[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@DTYPES
@pytest.mark.parametrize("model_type", ["mamba", "compressm_mamba", "lru"])
def test_layers_of_different_sizes_are_recorded(model, dtype, data, tmp_path):
    """A config that was loaded says its model type by an attribute of its own, and has to give it up."""
    config = CompreSSMConfig(cut_fraction=0.5, allocation="per_layer", skip_layers=[1])
    model.to(dtype).save_pretrained(tmp_path / "whole")
    model = type(model).from_pretrained(tmp_path / "whole")
    before = state_sizes(model)
    compress(model, analyze(model, data, config))
    assert state_sizes(model) == {0: 8, 1: before[1]}
    model.save_pretrained(tmp_path / "cut")
    loaded = type(model).from_pretrained(tmp_path / "cut")
    assert check_checkpoint(tmp_path / "cut") == state_sizes(loaded) == state_sizes(model)
    assert model.config.model_type == loaded.config.model_type == type(model.config).model_type


@pytest.mark.parametrize("model_type", CASES)
def test_a_run_that_cuts_resumes_exactly(model, model_type, dataset, labelled, tmp_path):
    examples = dataset if registry.family_of(model).is_language_model else labelled

    def trainer_in(folder, model):
        callback = CompreSSMCallback(CompreSSMConfig(target_state_size=4), CompreSSMSchedule(end=0.5, events=2))
        trainer = build_trainer(folder, examples, model=model, save_strategy="steps", save_steps=7, max_steps=14)
        callback.attach(trainer)
        return trainer

    whole = trainer_in(tmp_path / "a", model)
    whole.train()
    assert set(state_sizes(whole.model).values()) == {4}
    resumed = trainer_in(tmp_path / "b", CASES[model_type]())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-7"))
    assert_identical(weights_of(whole.model), weights_of(resumed.model))
    assert losses_of(resumed) == losses_of(whole)
