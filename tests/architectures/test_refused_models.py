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
        ("recurrent_gemma", "not known to have one"),
        ("qwen3_next", "not known to have one"),
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
    with pytest.raises(ValueError, match=r"x_proj\.weight belongs to a .*LoraLinear, .*Merge adapters"):
        analyze(model, batches, TARGET)


def test_a_model_with_adapters_is_refused(batches):
    model = build_model()
    model.peft_config = {"default": object()}
    with pytest.raises(ValueError, match="carries PEFT adapters"):
        analyze(model, batches, TARGET)


def test_wrapped_models_are_refused(batches):
    with pytest.raises(ValueError, match="wrapped in DataParallel"):
        analyze(torch.nn.DataParallel(build_model()), batches, TARGET)


class PackedLinear(torch.nn.Module):
    """A quantised layer whose weight is a method, as those of torch.ao."""

    def weight(self):
        """Nothing reads it."""


@pytest.mark.parametrize("name", ["x_proj", "out_proj"])
def test_a_packed_projection_is_refused(batches, name):
    model = build_model()
    setattr(model.backbone.layers[1].mixer, name, PackedLinear())
    with pytest.raises(ValueError, match=rf"layer 1: {name}\.weight belongs to a .*PackedLinear, .* quantise after"):
        analyze(model, batches, TARGET)


def test_quantised_weights_are_refused(batches):
    class Int8Tensor(torch.Tensor):
        """A tensor of another class, as torchao puts into a plain nn.Linear."""

    model = build_model()
    projection = model.backbone.layers[0].mixer.in_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().as_subclass(Int8Tensor))
    with pytest.raises(ValueError, match=r"in_proj\.weight is a Int8Tensor, .* cut first, then quantise"):
        analyze(model, batches, TARGET)


@pytest.mark.parametrize("part", ["", "backbone.layers.1"])
def test_an_offloaded_model_is_refused(batches, part):
    model = build_model()
    model.get_submodule(part).to("meta")
    with pytest.raises(ValueError, match="on device 'meta': it is offloaded .* Load it onto one CPU or CUDA device"):
        analyze(model, batches, TARGET)
