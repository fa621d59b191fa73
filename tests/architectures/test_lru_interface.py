"""An LRU model is called like any model of Transformers; its recurrence has every derivative."""

import inspect
import math

import pytest
import torch
from conftest import VOCABULARY, build_lru
from torch.func import hessian, jvp, vmap
from transformers import set_seed

from hf_compressm import LRUForSequenceClassification, LRUModel
from hf_compressm.architectures.time_invariant.lru import modeling_lru
from hf_compressm.architectures.time_invariant.lru.linear_recurrence import linear_recurrence

INPUT_IDS = torch.arange(18).view(2, 9)


def test_hidden_states_are_the_input_of_the_first_block_and_the_outputs_of_all():
    model, seen = build_lru().eval(), []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    for called in (model, model.model):
        seen.clear()
        output = called(input_ids=INPUT_IDS, output_hidden_states=True)
        assert len(output.hidden_states) == len(seen) == 3
        assert all(map(torch.equal, output.hidden_states, seen))
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
    assert model(input_ids=INPUT_IDS).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(input_ids=INPUT_IDS).hidden_states) == 3
    assert model(input_ids=INPUT_IDS, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("by_config", [False, True])
def test_return_dict_false_gives_a_tuple_of_what_there_is(by_config):
    model, labels = build_lru().eval(), torch.tensor([0, 1])
    arguments = {"input_ids": INPUT_IDS, "output_hidden_states": True}
    expected = model(**arguments, labels=labels), model.model(**arguments)
    if by_config:
        model.config.return_dict = False
        assert model(**arguments, labels=labels, return_dict=True).keys() == expected[0].keys()
    else:
        arguments["return_dict"] = False
    for found, output in zip((model(**arguments, labels=labels), model.model(**arguments)), expected, strict=True):
        assert type(found) is tuple
        torch.testing.assert_close(found, output.to_tuple(), rtol=0, atol=0)


@pytest.mark.parametrize("model", [build_lru(), build_lru().model], ids=["classifier", "base"])
def test_a_misspelt_argument_is_refused_by_name(model):
    with pytest.raises(TypeError, match="unexpected keyword argument 'atention_mask'"):
        model(input_ids=INPUT_IDS, atention_mask=torch.ones_like(INPUT_IDS))
    assert model(input_ids=INPUT_IDS, use_cache=False) is not None


@pytest.mark.parametrize("model_class", [LRUModel, LRUForSequenceClassification])
def test_the_main_input_is_the_first_argument_and_that_of_the_model(model_class):
    names = list(inspect.signature(model_class.forward).parameters)
    assert names[1] == model_class.main_input_name == "input_ids"
    for vocab_size, name in ((VOCABULARY, "input_ids"), (None, "input_values")):
        config = build_lru(vocab_size=vocab_size).config
        assert model_class(config).main_input_name == name


# Derivatives


def plain_loop(eigenvalues: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    state, states = torch.zeros_like(inputs[:, 0]), []
    for drive in inputs.unbind(1):
        state = eigenvalues * state + drive
        states.append(state)
    return torch.stack(states, 1)


def system(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    set_seed(length)
    eigenvalues = torch.polar(torch.rand(3, dtype=torch.float64), 2 * math.pi * torch.rand(3, dtype=torch.float64))
    return eigenvalues, torch.randn(2, length, 3, dtype=torch.complex128)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_first_and_second_derivatives_in_both_modes_equal_finite_differences(length):
    inputs = [tensor.requires_grad_() for tensor in system(length)]
    assert torch.autograd.gradcheck(linear_recurrence, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(linear_recurrence, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("length", [1, 7])
def test_the_transforms_of_torch_give_what_they_give_of_a_plain_loop(length):
    eigenvalues, inputs = system(length)
    several = torch.stack([eigenvalues, eigenvalues.conj(), 0.5 * eigenvalues])
    results = []
    for recurrence in (linear_recurrence, plain_loop):

        def loss(real, imaginary, recurrence=recurrence):
            states = recurrence(torch.complex(real, imaginary), inputs)
            return (states.real**3).sum() + states.imag.square().sum()

        parts = eigenvalues.real.contiguous(), eigenvalues.imag.contiguous()
        results.append(
            [
                hessian(loss, argnums=(0, 1))(*parts),
                jvp(recurrence, (eigenvalues, inputs), (eigenvalues, inputs)),
                vmap(recurrence, (0, None))(several, inputs),
                vmap(recurrence, (None, 2))(eigenvalues, torch.stack([inputs, 2 * inputs], 2)),
                vmap(recurrence, (1, 0))(several.mT, torch.stack([inputs, 2 * inputs, 3 * inputs])),
            ]
        )
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_second_derivatives_of_a_model_by_named_inputs_are_those_of_the_plain_loop(monkeypatch):
    model = build_lru().double().eval()
    parameters = [model.model.layers[0].mixer.nu_log, model.model.layers[1].mixer.C]

    def second_derivatives():
        first = torch.autograd.grad(model(input_ids=INPUT_IDS).logits.square().sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), parameters)

    found = second_derivatives()
    monkeypatch.setattr(modeling_lru, "linear_recurrence", plain_loop)
    torch.testing.assert_close(found, second_derivatives(), rtol=1e-9, atol=1e-12)
