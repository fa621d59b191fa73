"""This study times the scan of Mamba-2, forward and backward, and a training step: ours against Transformers' own."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2 import modeling_mamba2

from hf_compressm import parameter_groups
from hf_compressm.architectures.foreign_kernels import reference_of
from hf_compressm.architectures.installed_scan import kernel_in_force
from hf_compressm.kernels.dispatch import FOREIGN, SCALAR_DECAY, scan_name
from hf_compressm.kernels.scalar_decay_scan import scalar_decay_scan

from .arguments import Arguments
from .measuring import SHARE, Limits, added_peak, mebibytes, median, ratio_quartiles, show, table, time_in_turn
from .scan import TOLERANCE, gradients
from .training import OWN, scan_chosen

ORIGINAL = modeling_mamba2.mamba2_chunk_scan  # a kernel of mamba-ssm where that is installed
REFERENCE = reference_of(ORIGINAL)  # the PyTorch one, even beside mamba-ssm
TRANSFORMERS, MAMBA_SSM = "Transformers", "mamba-ssm"
CHUNK = 256  # of Transformers' own scan, as its Mamba-2 has it
FLOPS = 2 * 6  # per channel, state and position: the state and what it gives, forward; four products going back


def scans(device: str) -> dict[str, Callable[..., Tensor]]:
    """Return name → scan of (x, Δ, A, B, C, D); ours come first, the fastest before the other."""
    own = [name for name in reversed(SCALAR_DECAY) if scan_name(device, own=(name,)) == name]
    found = {name: partial(scalar_decay_scan, implementation=name) for name in own}
    if kernel_in_force(device, model_type="mamba2") in FOREIGN:
        found[MAMBA_SSM] = partial(_of_transformers, ORIGINAL)
    found[TRANSFORMERS] = partial(_of_transformers, REFERENCE)
    return found


def _of_transformers(scan: Callable, x, time_step, A, B, C, D) -> Tensor:
    return scan(x, time_step, A, B, C, chunk_size=CHUNK, D=D)


def study_mamba2(args: Arguments, limits: Limits) -> dict:
    """Measure by N the scan, its memory at the largest N, and a training step with each scan."""
    check_agreement(args)
    largest = max(args.mamba2_sizes)
    inputs = scan_inputs(args, largest)
    peaks = {
        name: added_peak(partial(gradients, scan, *inputs), args.device) for name, scan in scans(args.device).items()
    }
    return {
        "scan": [scan_point(args, size, limits) for size in args.mamba2_sizes],
        "peak_bytes": peaks,
        "peak_state_size": largest,
        "step": [step_point(args, size) for size in args.mamba2_sizes],
    }


def scan_inputs(args: Arguments, size: int) -> tuple[list[Tensor], Tensor]:
    """Return what a mixer passes, with one group of heads, and a gradient for the output."""
    random = partial(torch.randn, generator=torch.Generator().manual_seed(args.seed))
    shape, heads = (args.mamba2_batch_size, args.mamba2_length), args.mamba2_heads
    values = [
        F.silu(random(*shape, heads, args.mamba2_head_dim)),
        F.softplus(random(*shape, heads) - 3),
        -torch.linspace(1, 16, heads),
        F.silu(random(*shape, 1, size)),
        F.silu(random(*shape, 1, size)),
        torch.ones(heads),
    ]
    narrow = [getattr(torch, args.dtype) if value.dim() > 1 else torch.float32 for value in values]
    moved = [value.to(args.device, dtype).requires_grad_() for value, dtype in zip(values, narrow, strict=True)]
    return moved, random(*shape, heads, args.mamba2_head_dim).to(args.device)


def check_agreement(args: Arguments) -> None:
    """Refuse scans that do not give the gradients of Transformers' own: nothing is timed then."""
    inputs, grad_output = scan_inputs(args, max(args.mamba2_sizes))
    expected = gradients(scans(args.device)[TRANSFORMERS], inputs, grad_output)
    for name, scan in scans(args.device).items():
        found = gradients(scan, inputs, grad_output)
        worst = max(float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True))
        if not worst <= TOLERANCE[args.dtype]:
            raise ValueError(f"the scan {name!r} of Mamba-2 disagrees with Transformers' own by {worst:.1e}.")


def scan_point(args: Arguments, size: int, limits: Limits) -> dict:
    print(f"Scan of Mamba-2, batch = {args.mamba2_batch_size}, L = {args.mamba2_length}, N = {size}", flush=True)
    inputs, grad_output = scan_inputs(args, size)
    runs = {name: partial(gradients, scan, inputs, grad_output) for name, scan in scans(args.device).items()}
    x, _, _, B, *_ = inputs
    # Read twice and written once, as gradients: x, B and C; y is written, its gradient read.
    least_bytes = 3 * (x.nbytes + 2 * B.nbytes) + 2 * 4 * x.numel()
    least = limits.seconds(least_bytes, 0, matrix_flops=FLOPS * x.numel() * size)
    return compared(runs, args) | {"N": size, "limit_seconds": least}


def step_point(args: Arguments, size: int) -> dict:
    print(f"Training step of a Mamba-2, N = {size}", flush=True)
    names = [OWN if name == TRANSFORMERS else name for name in scans(args.device) if name != MAMBA_SSM]
    runs = {TRANSFORMERS if name == OWN else name: Mamba2Training(args, size, name).step for name in names}
    return compared(runs, args) | {"N": size}


def compared(runs: dict[str, Callable], args: Arguments) -> dict:
    """Time runs in turn, after one of each, and compare each with Transformers' own in the same round."""
    for run in runs.values():
        run()
    seconds = time_in_turn(runs, dict.fromkeys(runs, args.rounds), args.device)
    return {
        "median_seconds": {name: median(values) for name, values in seconds.items()},
        "transformers_to_it_quartiles": {
            name: ratio_quartiles(seconds[TRANSFORMERS], values) for name, values in seconds.items()
        },
        "seconds": seconds,
    }


class Mamba2Training:
    """It trains a Mamba-2 with AdamW on random tokens, by the scan of that name."""

    def __init__(self, args: Arguments, size: int, scan: str):
        self.scan = scan
        config = Mamba2Config(
            vocab_size=args.vocab_size,
            hidden_size=args.mamba2_heads * args.mamba2_head_dim // 2,
            num_hidden_layers=args.num_hidden_layers,
            num_heads=args.mamba2_heads,
            head_dim=args.mamba2_head_dim,
            n_groups=1,
            state_size=size,
            chunk_size=CHUNK,
        )
        self.model = Mamba2ForCausalLM(config).to(args.device).train()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, weight_decay=0.1), lr=1e-3)
        shape = args.mamba2_batch_size, args.mamba2_length
        self.batch = torch.randint(args.vocab_size, shape, device=args.device)

    def step(self) -> None:
        with scan_chosen(self.scan):
            self.model(input_ids=self.batch, labels=self.batch, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def mamba2_tables(result: dict, args: Arguments) -> str:
    text = "## Mamba-2: the scan, forward and backward, and a training step\n\n"
    text += f"batch {args.mamba2_batch_size}, L {args.mamba2_length}, "
    text += f"{args.mamba2_heads} heads of {args.mamba2_head_dim}, one group\n"
    for key, title in (("scan", "scan"), ("step", f"training step, {args.num_hidden_layers} layers")):
        rows = [
            [
                str(point["N"]),
                name,
                f"{1000 * seconds:,.1f}",
                show(point["transformers_to_it_quartiles"][name]),
                f"{point['limit_seconds'] / seconds:.1%}" if "limit_seconds" in point else "",
            ]
            for point in result[key]
            for name, seconds in point["median_seconds"].items()
        ]
        text += "\n" + table(["N", title, "ms", f"{TRANSFORMERS} / it", SHARE], rows)
    peaks = ", ".join(f"{name} {mebibytes(peak)}" for name, peak in result["peak_bytes"].items())
    return text + f"\nPeak memory of the scan at N {result['peak_state_size']}, MiB: {peaks}.\n"
