"""This Transformers model is the Linear Recurrent Unit (Orvieto et al., arXiv 2303.06349), with a size per layer.

h_k = λ h_{k-1} + γ B u_k,   y_k = Re(C h_k) + D u_k,   λ = exp(-exp(ν) + i exp(θ))
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from .configuration_lru import LRUConfig
from .linear_recurrence import linear_recurrence

SMALLEST = 1e-30  # it takes the place of an eigenvalue or a phase of zero, which has no logarithm


class LRUMixer(nn.Module):
    """A mixer is one LRU layer; it keeps B and C as pairs of reals, which every optimizer and file format takes."""

    def __init__(self, config: LRUConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.state_size = N = config.state_sizes[layer_idx]
        H = config.hidden_size
        self.nu_log = nn.Parameter(torch.empty(N))
        self.theta_log = nn.Parameter(torch.empty(N))
        self.gamma_log = nn.Parameter(torch.empty(N))
        self.B = nn.Parameter(torch.empty(N, H, 2))
        self.C = nn.Parameter(torch.empty(H, N, 2))
        self.D = nn.Parameter(torch.empty(H))

    def forward(self, u: Tensor) -> Tensor:
        """Map inputs to outputs, (batch, L, H) each, computed in float32 at least, whatever the autocast."""
        dtype = torch.promote_types(self.nu_log.dtype, torch.float32)
        with torch.autocast(u.device.type, enabled=False):
            inputs = u.to(dtype)
            B = self.B.to(dtype) * self.gamma_log.to(dtype).exp()[:, None, None]
            drive = F.linear(inputs, B.transpose(1, 2).flatten(0, 1)).unflatten(-1, (-1, 2))  # (batch, L, N, 2)
            states = linear_recurrence(self._eigenvalues(dtype), torch.view_as_complex(drive))
            C = self.C.to(dtype) * self.C.new_tensor([1.0, -1.0], dtype=dtype)  # Re(C h) = C_re h_re - C_im h_im
            outputs = F.linear(torch.view_as_real(states).flatten(-2), C.flatten(1)) + self.D.to(dtype) * inputs
        return outputs.to(u.dtype)

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (λ, γB, C), complex128, (N,), (N, H) and (H, N), of which the layer gives Re(C h) + D u."""
        B, C = torch.view_as_complex(self.B.double()), torch.view_as_complex(self.C.double())
        return self._eigenvalues(torch.float64), B * self.gamma_log.double().exp()[:, None], C

    @staticmethod
    def parameters_of(eigenvalues: Tensor, B: Tensor, C: Tensor) -> dict[str, Tensor]:
        """Return the parameters, float64, by name, of a layer that has this system: the inverse of `system`.

        As at initialisation, γ = sqrt(1 - |λ|²); each state is scaled such that its row of B has norm 1, which is what
        the initialiser gives it on average.
        """
        modulus, phase = eigenvalues.abs().clamp_min(SMALLEST), eigenvalues.angle().remainder(2 * math.pi)
        gamma = (1 - modulus.square()).sqrt()
        B = B / gamma[:, None]
        norm = B.norm(dim=1)
        norm = torch.where(norm > 0, norm, 1.0)
        return {
            "nu_log": (-modulus.log()).log(),
            "theta_log": phase.clamp_min(SMALLEST).log(),
            "gamma_log": gamma.log(),
            "B": torch.view_as_real(B / norm[:, None]),
            "C": torch.view_as_real(C * norm),
        }

    def initialise(self, r_min: float, r_max: float, max_phase: float) -> None:
        """Draw eigenvalues uniformly on a ring, and normalise the inputs, as in arXiv 2303.06349, section 3."""
        u, v = torch.rand(self.state_size), torch.rand(self.state_size)
        squared_modulus = (u * (r_max**2 - r_min**2) + r_min**2).clamp_min(SMALLEST)
        init.copy_(self.nu_log, (-0.5 * squared_modulus.log()).log())
        init.copy_(self.theta_log, (max_phase * v).clamp_min(SMALLEST).log())
        init.copy_(self.gamma_log, (1 - squared_modulus).sqrt().log())
        init.normal_(self.B, std=1 / math.sqrt(2 * self.B.shape[1]))
        init.normal_(self.C, std=1 / math.sqrt(self.state_size))
        init.normal_(self.D)

    def _eigenvalues(self, dtype: torch.dtype) -> Tensor:
        return torch.polar((-self.nu_log.to(dtype).exp()).exp(), self.theta_log.to(dtype).exp())


class LRUBlock(GradientCheckpointingLayer):
    """A block applies a norm, the LRU, GELU, a gated linear unit and dropout, and adds the result to its input."""

    def __init__(self, config: LRUConfig, layer_idx: int):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = LRUMixer(config, layer_idx)
        self.gate = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (batch, L, H) to the same; positions where `mask`, (batch, L, 1), is 0 put nothing into the state."""
        u = self.norm(hidden_states)
        u = u if mask is None else u * mask
        return hidden_states + self.dropout(F.glu(self.gate(F.gelu(self.mixer(u)))))


class LRUPreTrainedModel(PreTrainedModel):
    """This class is the base of the LRU models."""

    config_class = LRUConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("LRUBlock",)

    def __init__(self, config: LRUConfig):
        super().__init__(config)
        if config.vocab_size is None:
            self.main_input_name = "input_values"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LRUMixer):
            module.initialise(self.config.r_min, self.config.r_max, self.config.max_phase)
        elif isinstance(module, nn.Linear):
            init.lecun_normal_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
            if module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])
        else:
            super()._init_weights(module)


class LRUModel(LRUPreTrainedModel):
    """The model applies an embedding or a linear encoder, then the blocks."""

    def __init__(self, config: LRUConfig):
        super().__init__(config)
        if config.vocab_size is None:
            self.encoder = nn.Linear(config.num_channels, config.hidden_size)
        else:
            self.encoder = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LRUBlock(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the tokens, or the linear encoder of the values."""
        return self.encoder

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of the tokens, or the linear encoder of the values."""
        self.encoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutput:
        """Compute the hidden states, (batch, L, H), of a sequence of tokens or of values.

        Args:
            input_ids: (batch, L), for a model with a `vocab_size`.
            input_values: (batch, L, num_channels), or (batch, L) for one channel; for a model without a `vocab_size`.
            attention_mask: 1 for positions that count, 0 for padding, (batch, L).
            output_hidden_states: True returns the input of the first block and the output of each, too; None is as
                the config says.
            use_cache: it changes nothing: these models have no cache. Code for any model passes it.

        With `return_dict=False`, here or in the config, the result is a tuple.

        Raises:
            ValueError: none or both of the inputs are given, or the one that the model was not built for, or the
                sequence is empty.
        """
        expected = "input_values" if self.config.vocab_size is None else "input_ids"
        given = {"input_ids": input_ids, "input_values": input_values}
        inputs = given.pop(expected)
        if inputs is None or any(other is not None for other in given.values()):
            raise ValueError(f"this model takes {expected} (vocab_size = {self.config.vocab_size}), and only them.")
        if inputs.shape[1] == 0:
            raise ValueError(f"{expected} of shape {tuple(inputs.shape)}: a sequence needs at least one position.")
        if expected == "input_values":
            inputs = inputs.unsqueeze(-1) if inputs.ndim == 2 else inputs
            inputs = inputs.to(self.encoder.weight.dtype)
        hidden_states = self.encoder(inputs)
        mask = None if attention_mask is None else attention_mask.unsqueeze(-1).to(hidden_states.dtype)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        every = (hidden_states,) if wanted else None
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask)
            every = (*every, hidden_states) if wanted else None
        return BaseModelOutput(last_hidden_state=hidden_states, hidden_states=every)


class LRUForSequenceClassification(LRUPreTrainedModel):
    """The classifier applies an LRU model, a mean over the positions and a linear head."""

    accepts_loss_kwargs = False  # the loss is a mean over the batch, whatever the kind of labels

    def __init__(self, config: LRUConfig):
        super().__init__(config)
        self.model = LRUModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        use_cache: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Compute the logits, (batch, num_labels), and the loss where `labels`, (batch,), are given.

        The other arguments, and `return_dict`, are those of `LRUModel.forward`.
        """
        encoded = self.model(input_ids, input_values, attention_mask, output_hidden_states, return_dict=True)
        hidden_states = encoded.last_hidden_state
        if attention_mask is None:
            pooled = hidden_states.mean(1)
        else:
            weight = attention_mask.unsqueeze(-1).to(hidden_states.dtype)
            pooled = (hidden_states * weight).sum(1) / weight.sum(1).clamp_min(1)
        logits = self.classifier(pooled)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
