"""A state space model that the package has never heard of: selective, with a state in every other layer only."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hf_compressm.kernels import selective_scan

scan = selective_scan  # the function that the layers call, as Mamba's do


class ToyConfig(PreTrainedConfig):
    model_type = "toy_ssm"
    vocab_size: int = 512
    width: int = 16
    states: int = 8
    num_hidden_layers: int = 4


class ToyMixer(nn.Module):
    def __init__(self, config: ToyConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.states = config, layer_idx, config.states
        self.maps = nn.Parameter(torch.randn(2 * config.states, config.width) / 4)  # rows of C, then of B
        self.log_decay = nn.Parameter(torch.arange(1, config.states + 1).log().repeat(config.width, 1))
        self.step, self.out = nn.Linear(config.width, config.width), nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = x.transpose(1, 2)
        C, B = (torch.einsum("nd,bdl->bnl", rows, u) for rows in self.maps.split(self.states))
        y = scan(u, F.softplus(self.step(x) - 3).transpose(1, 2), -self.log_decay.exp(), B, C)
        return self.out(y.transpose(1, 2))


class ToyForCausalLM(PreTrainedModel):
    config_class, base_model_prefix = ToyConfig, "model"

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(
            ToyMixer(config, i) if i % 2 else nn.Linear(config.width, config.width)
            for i in range(config.num_hidden_layers)
        )
        self.head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, labels=None, **kwargs) -> CausalLMOutput:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(F.rms_norm(hidden, hidden.shape[-1:]))
        logits = self.head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)
