"""These arguments say what is measured, where, and at which sizes."""

from dataclasses import dataclass, field

from hf_compressm.config import option


@dataclass
class Arguments:
    """The defaults of these arguments are the sizes for a CPU; those named mamba2_… hold for Mamba-2 alone."""

    device: str = option("cpu", "Device: cpu or cuda.")
    threads: int = option(2, "CPU threads of torch.")
    output_dir: str = option("runs/benchmark", "Folder for benchmark.json, benchmark.md and benchmark.png.")
    seed: int = option(0, "Seed of random inputs, tokens and weights.")
    rounds: int = option(15, "Timed rounds.")
    patience: float = option(
        5.0,
        "What has taken these seconds in all is not timed again; a scan that takes them once is spared larger sizes.",
    )

    long_length: int = option(2048, "scan: sequence length at which memory is told once more, at batch 1.")
    dtype: str = option("float32", "scan: dtype of the inputs. Training on a GPU is in bfloat16 autocast.")
    batch_size: int = option(8, "scan, training: sequences per batch of Mamba-1.")
    length: int = option(128, "scan, training: sequence length L of Mamba-1.")
    hidden_size: int = option(128, "Width of a Mamba-1; its layers have twice as many channels.")
    state_size: int = option(128, "scan: state size N that all scans are compared at. training: N before a cut.")
    state_sizes: list[int] = field(
        default_factory=lambda: [1, 4, 16, 64, 256],
        metadata={"help": "scan: other state sizes of Mamba-1 at that length."},
    )
    lengths: list[int] = field(
        default_factory=lambda: [128, 512, 2048, 8192],
        metadata={"help": "scan: lengths of Mamba-1, at batch 1 and N = 16."},
    )
    step_sizes: list[int] = field(
        default_factory=lambda: [64],
        metadata={"help": "training: N at which scans of Mamba-1 are compared by the whole step."},
    )
    size_after: int = option(12, "training: N of Mamba-1 after the cut.")

    mamba2_batch_size: int = option(2, "scan, training: sequences per batch.")
    mamba2_length: int = option(512, "scan, training: sequence length L.")
    mamba2_heads: int = option(8, "Heads of a layer, in one group; the model is half as wide as all of them.")
    mamba2_head_dim: int = option(64, "Channels of a head.")
    mamba2_state_sizes: list[int] = field(
        default_factory=lambda: [8, 16, 32, 64, 256], metadata={"help": "scan: other state sizes N at that length."}
    )
    mamba2_lengths: list[int] = field(
        default_factory=lambda: [128, 512, 2048, 8192], metadata={"help": "scan: lengths, at batch 1 and N = 64."}
    )
    mamba2_step_sizes: list[int] = field(
        default_factory=lambda: [16, 128],
        metadata={"help": "training: N at which scans are compared by the whole step."},
    )
    mamba2_size_after: int = option(16, "training: N after the cut.")

    num_hidden_layers: int = option(4, "training, throughput, decoding: number of layers.")
    vocab_size: int = option(4096, "training, throughput, decoding: tokens of the vocabulary.")
    run_sizes: list[int] = field(
        default_factory=lambda: [64, 16],
        metadata={"help": "training: N at the start and end of the run whose analysis is told."},
    )
    run_steps: int = option(2000, "training: steps of that run; it is cut four times in its first tenth.")
    throughput_sizes: list[int] = field(
        default_factory=lambda: [8, 16, 32, 64, 128], metadata={"help": "throughput: N of the models."}
    )
    decode_sizes: list[int] = field(
        default_factory=lambda: [1, 4, 16, 64, 128], metadata={"help": "decoding: state sizes N."}
    )
    decode_batches: list[int] = field(
        default_factory=lambda: [1, 8], metadata={"help": "decoding: sequences that are generated at once."}
    )
    decode_tokens: int = option(32, "decoding: tokens per timing.")


# Sizes for a GPU: a scan of mamba-130m and of mamba2-130m at length 2,048, and these models whole.
ON_CUDA = {
    "rounds": 10,
    "patience": 3.0,
    "dtype": "bfloat16",
    "batch_size": 4,
    "length": 2048,
    "hidden_size": 768,
    "state_sizes": [12, 16, 64],
    "lengths": [512, 2048, 8192, 32768],
    "step_sizes": [128],
    "mamba2_batch_size": 4,
    "mamba2_length": 2048,
    "mamba2_heads": 24,
    "mamba2_state_sizes": [16, 64, 256],
    "mamba2_lengths": [512, 2048, 8192, 32768],
    "num_hidden_layers": 24,
    "vocab_size": 50280,
    "run_sizes": [128, 16],
    "throughput_sizes": [16, 32, 64, 128],
    "decode_sizes": [16, 128],
    "decode_tokens": 16,
}
