"""A model that cannot be reduced is refused: by its type, its wrapper, or what does not fit in it."""

import pytest
import torch
from conftest import build_model, build_trainer
from trainer_callbacks import cutting_callback
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from hf_compressm import CompreSSMConfig, analyze

TARGET = CompreSSMConfig(target_state_size=4)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("falcon_mamba", "normalises B and C over the state"),
        ("mamba2", "shared within heads and groups"),
        ("jamba", "hybrids"),
        ("zamba2", "hybrids"),
        ("bamba", "hybrids"),
    ],
)
def test_other_state_space_models_are_refused_by_name(batches, model_type, reason):
    class Holder(torch.nn.Linear):  # the weights do not matter: the type is refused before they are read
        config = AutoConfig.for_model(model_type)

    with pytest.raises(ValueError, match=f"model type '{model_type}': .*{reason}.* Supported: mamba"):
        analyze(Holder(2, 2), batches, TARGET)


def test_models_without_state_layers_are_refused(tmp_path, dataset, batches):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="model type 'gpt2': .* Supported: mamba"):
        analyze(gpt2, batches, TARGET)
    with pytest.raises(ValueError, match="model type 'gpt2'"):
        build_trainer(tmp_path, dataset, [cutting_callback()], model=gpt2)
    with pytest.raises(ValueError, match="there is no state to resize"):
        analyze(build_model(num_hidden_layers=0), batches, TARGET)


def test_a_model_whose_weights_and_size_disagree_is_refused(batches):
    model = build_model()
    model.backbone.layers[0].mixer.ssm_state_size = 8
    with pytest.raises(ValueError, match=r"layer 0: x_proj\.weight has 34 entries .* state_size = 8 asks for 18"):
        analyze(model, batches, TARGET)


def test_an_adapter_on_the_projection_is_refused(batches):
    class LoraLinear(torch.nn.Linear):
        pass

    model = build_model()
    model.backbone.layers[0].mixer.x_proj = LoraLinear(64, 34, bias=False)
    with pytest.raises(ValueError, match="belongs to a LoraLinear.*Merge adapters"):
        analyze(model, batches, TARGET)


def test_a_model_with_adapters_is_refused(batches):
    model = build_model()
    model.peft_config = {"default": object()}
    with pytest.raises(ValueError, match="carries PEFT adapters"):
        analyze(model, batches, TARGET)


def test_wrapped_models_are_refused(batches):
    with pytest.raises(ValueError, match="wrapped in DataParallel"):
        analyze(torch.nn.DataParallel(build_model()), batches, TARGET)
