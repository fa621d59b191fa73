"""What the toy declares of its state: the smallest family that can do everything."""

from contextlib import contextmanager

import pytest
import torch
import toy_ssm
from toy_ssm import ToyConfig, ToyForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM

from hf_compressm.architectures import register, registry
from hf_compressm.architectures.family import Block, StateTensor
from hf_compressm.architectures.selective.family import SelectiveFamily
from hf_compressm.kernels import selective_scan
from hf_compressm.theory.selective import StateMaps


class ToyFamily(SelectiveFamily):
    model_types = ("toy_ssm",)
    mixer_class = "ToyMixer"
    size_attribute = size_field = "states"
    tensors = {  # noqa: RUF012
        "maps": StateTensor(axis=0, blocks=(Block("C"), Block("B"))),
        "log_decay": StateTensor(axis=1),
    }
    decay, output_projection = "log_decay", "out.weight"
    title, limits = "Toy", "It is a toy."

    def layers_of_config(self, config):
        return list(range(1, config["num_hidden_layers"], 2))

    def is_per_layer(self, model):
        return False

    def record_in_model(self, model, sizes):
        model.config.states = max(sizes.values())

    def maps(self, tensors, mixer, size=None):
        B, C = (tensors["maps"][self.block_slice(mixer, "maps", name, size)] for name in ("B", "C"))
        return StateMaps(B, C, tensors["log_decay"])

    @contextmanager
    def observed_scan(self, observer):
        def observed(u, time_step, A, B, C):
            return observer(u, time_step, A, B, C, None, None, None, False)[0]

        toy_ssm.scan = observed
        try:
            yield
        finally:
            toy_ssm.scan = selective_scan

    def layer_output(self, mixer):
        def output(maps, inputs):
            B, C = (torch.einsum("nd,bdl->bnl", rows, inputs.u) for rows in (maps.B_rows, maps.C_rows))
            return mixer.out.weight.detach() @ selective_scan(inputs.u, inputs.time_step, -maps.A_log.exp(), B, C)

        return output

    def undecayed(self, mixer):
        yield mixer.log_decay

    def values_per_state(self, config):
        return config["width"]


@pytest.fixture
def toy_registered():
    """The toy is known to the library within the test, and to Transformers from then on."""
    before = dict(registry.FAMILIES)
    register(ToyFamily())
    AutoConfig.register("toy_ssm", ToyConfig, exist_ok=True)
    AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)
    yield
    registry.FAMILIES.clear()
    registry.FAMILIES.update(before)
