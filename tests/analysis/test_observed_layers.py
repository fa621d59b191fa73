"""Inputs of a layer are collected without running the layers behind it."""

from conftest import build_model

from hf_compressm.analysis.activations import layer_inputs
from hf_compressm.analysis.calibration import undisturbed
from hf_compressm.architectures import state_layers


def test_a_forward_pass_ends_behind_the_layer_whose_inputs_are_wanted(batches):
    """Three layers: a refit that ran all of them for each would cost the square of their number."""
    model = build_model(num_hidden_layers=3)
    layers, ran = state_layers(model), []
    for index, mixer in layers.items():
        mixer.register_forward_pre_hook(lambda module, args, index=index: ran.append(index))
    with undisturbed(model):
        inputs = [layer_inputs(layers, batches[:2], index, {}) for index in layers]
    assert ran == [0, 0, 0, 1, 0, 1, 0, 1, 2, 0, 1, 2]
    assert [len(of_layer) for of_layer in inputs] == [2, 2, 2]
    assert all(hooks == 1 for hooks in (len(mixer._forward_pre_hooks) for mixer in layers.values()))
