"""These arguments say what is measured, where, and at which sizes."""

from dataclasses import dataclass, field

from hf_compressm.config import option


@dataclass
class Arguments:
    """The defaults of these arguments are the sizes for a CPU."""

    device: str = option("cpu", "Device: cpu or cuda.")
    threads: int = option(2, "CPU threads of torch.")
    output_dir: str = option("runs/benchmark", "Folder for benchmark.json, benchmark.md and benchmark.png.")
    seed: int = option(0, "Seed of random inputs, tokens and weights.")
    batch_size: int = option(8, "Sequences per batch.")
    rounds: int = option(15, "Timed rounds of what is quick.")
    slow_rounds: int = option(3, "Timed rounds of what is slow, such as Transformers' loop.")

    dtype: str = option("float32", "scan: dtype of the inputs. Training on a GPU is in bfloat16 autocast.")
    channels: int = option(256, "scan: channels D.")
    length: int = option(128, "scan: sequence length L.")
    state_size: int = option(128, "scan: state size N that all scans are compared at.")
    state_sizes: list[int] = field(
        default_factory=lambda: [1, 4, 16, 64, 256], metadata={"help": "scan: other state sizes at that length."}
    )
    lengths: list[int] = field(
        default_factory=lambda: [128, 512, 2048, 8192], metadata={"help": "scan: lengths, at batch 1 and N = 16."}
    )
    patience: float = option(3.0, "scan: a scan that takes longer than these seconds is spared larger sizes.")

    block_size: int = option(128, "training, decode: sequence length of the model, in tokens.")
    hidden_size: int = option(128, "training, decode: width of the model.")
    num_hidden_layers: int = option(4, "training, decode: number of Mamba blocks.")
    vocab_size: int = option(4096, "training, decode: tokens of the vocabulary.")
    size_before: int = option(128, "training: N before the cut.")
    size_after: int = option(12, "training: N after the cut.")
    step_size: int = option(64, "training: N at which scans are compared by the whole step, and where a run starts.")
    run_size: int = option(16, "training: N at the end of the run whose share of analysis is told.")
    run_steps: int = option(2000, "training: steps of that run; it is cut four times in its first tenth.")
    decode_sizes: list[int] = field(
        default_factory=lambda: [1, 4, 16, 64, 128], metadata={"help": "decode: state sizes N."}
    )
    decode_tokens: int = option(32, "decode: tokens per timing.")

    mamba2_batch_size: int = option(2, "mamba2: sequences per batch.")
    mamba2_length: int = option(512, "mamba2: sequence length L.")
    mamba2_heads: int = option(8, "mamba2: heads; the model is half as wide as all of them.")
    mamba2_head_dim: int = option(64, "mamba2: channels of a head.")
    mamba2_sizes: list[int] = field(default_factory=lambda: [16, 128], metadata={"help": "mamba2: state sizes N."})


# Sizes for a GPU: one scan of mamba-130m at length 2,048, and that model whole.
ON_CUDA = {
    "dtype": "bfloat16",
    "channels": 1536,
    "length": 2048,
    "state_sizes": [12, 16, 64],
    "lengths": [512, 2048, 8192, 32768],
    "block_size": 1024,
    "hidden_size": 768,
    "num_hidden_layers": 24,
    "vocab_size": 50280,
    "step_size": 128,
    "run_size": 12,
}
