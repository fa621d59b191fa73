"""Mamba-2: its scan by this package, mamba-ssm, mamba-scan-lite, Transformers and step by step, and its models."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2 import modeling_mamba2

from hf_compressm.architectures.foreign_kernels import reference_of
from hf_compressm.architectures.replaced_functions import original_function
from hf_compressm.kernels.dispatch import SCALAR_DECAY
from hf_compressm.kernels.scalar_decay_scan import scalar_decay_scan

from .arguments import Arguments
from .family import MAMBA_SSM, Family, Shape
from .measuring import Work

TRANSFORMERS, LITE, RECURRENCE = "Transformers", "mamba-scan-lite", "recurrence"
CHUNK = 256  # of Transformers' own scan, as its Mamba-2 has it
FLOPS = 2 * 6  # per channel, state and position: the state and what it gives, forward; four products going back


class Mamba2(Family):
    """A Mamba-2 with one group: each head has one decay, and all heads share B and C."""

    model_type = "mamba2"
    title = "Mamba-2"
    implementations = SCALAR_DECAY
    bases = ("axis", "balanced")
    inputs = ("x", "dt", "A", "B", "C", "D")
    size_by_length = 64

    def __init__(self, args: Arguments):
        super().__init__(args)
        channels = args.mamba2_heads * args.mamba2_head_dim
        self.shape = Shape(args.mamba2_batch_size, args.mamba2_length, channels, args.state_size)
        self.checked = Shape(batch=1, length=CHUNK + 50, channels=3 * args.mamba2_head_dim, state_size=1)
        self.state_sizes, self.lengths = args.mamba2_state_sizes, args.mamba2_lengths
        self.step_sizes, self.size_after = args.mamba2_step_sizes, args.mamba2_size_after
        self.reference = recurrence
        self.of_transformers = {} if self.has_mamba_ssm else {TRANSFORMERS: {}}  # which runs mamba-ssm by itself

    def scans(self) -> dict[str, Callable[..., Tensor]]:
        found = {name: partial(scalar_decay_scan, implementation=name) for name in self.own_scans}
        original = original_function(modeling_mamba2, "mamba2_chunk_scan")
        if self.has_mamba_ssm:
            found[MAMBA_SSM] = partial(_of_transformers, original)
        found[TRANSFORMERS] = partial(_of_transformers, reference_of(original))
        if find_spec("mamba_scan_lite"):
            from mamba_scan_lite import chunked_scan  # which changes the Zamba2 of Transformers; none runs here

            found[LITE] = partial(_lite, chunked_scan)
        return found | {RECURRENCE: self.reference}

    def scan_inputs(self, shape: Shape) -> tuple[list[Tensor], Tensor]:
        random = partial(torch.randn, generator=torch.Generator().manual_seed(self.args.seed))
        rows, head_dim = (shape.batch, shape.length), self.args.mamba2_head_dim
        heads = shape.channels // head_dim
        values = {
            "x": F.silu(random(*rows, heads, head_dim)),
            "dt": F.softplus(random(*rows, heads) - 3),
            "A": -torch.linspace(1, 16, heads),
            "B": F.silu(random(*rows, 1, shape.state_size)),
            "C": F.silu(random(*rows, 1, shape.state_size)),
            "D": torch.ones(heads),
        }
        moved = self.narrow(values, exact=("A", "D"))
        return moved, random(*rows, heads, head_dim).to(self.args.device)

    def least_work(self, shape: Shape, dtype: torch.dtype) -> Work:
        """Count x, B and C, which are read twice and written once, as gradients, and y and its gradient."""
        positions = shape.batch * shape.length
        read = 3 * (shape.channels + 2 * shape.state_size) * dtype.itemsize + 2 * 4 * shape.channels
        return Work(positions * read, matrix_flops=FLOPS * positions * shape.channels * shape.state_size)

    def build(self, size: int, **options) -> Mamba2ForCausalLM:
        """Tie the embeddings, as the models of the paper do."""
        config = Mamba2Config(
            vocab_size=self.args.vocab_size,
            hidden_size=self.shape.channels // 2,
            num_hidden_layers=self.args.num_hidden_layers,
            num_heads=self.args.mamba2_heads,
            head_dim=self.args.mamba2_head_dim,
            n_groups=1,
            state_size=size,
            chunk_size=CHUNK,
            tie_word_embeddings=True,
            **options,
        )
        return Mamba2ForCausalLM(config).to(self.args.device)


def _of_transformers(scan: Callable, x, time_step, A, B, C, D) -> Tensor:
    return scan(x, time_step, A, B, C, chunk_size=CHUNK, D=D)


def _lite(scan: Callable, *inputs: Tensor) -> Tensor:
    x, time_step, A, B, C, D = (tensor.float() for tensor in inputs)
    batch, _, heads, head_dim = x.shape
    B, C = (each.expand(-1, -1, heads, -1) for each in (B, C))
    y, _ = scan(x.new_zeros(batch, heads, head_dim, B.shape[-1]), time_step, A, x, B, C, D.unsqueeze(-1))
    return y


def recurrence(*inputs: Tensor) -> Tensor:
    """Return y_t = H_t C_t + D x_t with H_t = exp(Δ_t A) H_{t-1} + Δ_t x_t B_tᵀ, a position at a time.

    Args:
        inputs: x, (batch, L, heads, p); Δ, (batch, L, heads); A, (heads,); B and C, (batch, L, 1, N); D, (heads,).
    """
    x, time_step, A, B, C, D = (tensor.float() for tensor in inputs)
    decay = (time_step * A).exp()[..., None, None]
    drive = (x * time_step.unsqueeze(-1)).unsqueeze(-1)
    state = x.new_zeros(*drive[:, 0].shape[:3], B.shape[-1])
    outputs = []
    for t in range(x.shape[1]):
        state = decay[:, t] * state + drive[:, t] * B[:, t, :, None]
        outputs.append((state @ C[:, t, :, :, None]).squeeze(-1))
    return torch.stack(outputs, 1) + D.unsqueeze(-1) * x
