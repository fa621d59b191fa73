"""This script trains without Trainer, in a loop of its own with Accelerate, and shrinks the state by two calls.

    python scripts/accelerate_loop.py
    accelerate launch --config_file scripts/accelerate/ddp.yaml scripts/accelerate_loop.py --max_steps 300
    python scripts/accelerate_loop.py --resume_from_checkpoint runs/accelerate_loop/checkpoint-100

Read it to write your own. A running average of the weights follows the model through the cuts.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from pretrain import DataArguments, ModelArguments, build_model, load_text, load_tokenizer, parse_arguments, tokenized
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers import default_data_collator, get_cosine_schedule_with_warmup, set_seed

from hf_compressm import CompreSSMConfig, CompreSSMSchedule, analyze, compress, install_scan, parameter_groups
from hf_compressm.analysis.checks import reducible_size
from hf_compressm.analysis.drawing import draw_batches
from hf_compressm.architectures import state_layers
from hf_compressm.storage.history import History, load_history, save_history
from hf_compressm.surgery.shrink_and_grow import set_state_sizes


@dataclass
class LoopArguments:
    """These arguments describe the run."""

    output_dir: str = field(default="runs/accelerate_loop", metadata={"help": "Folder for checkpoints and model."})
    max_steps: int = field(default=300, metadata={"help": "Number of optimizer steps."})
    batch_size: int = field(default=8, metadata={"help": "Sequences per process and step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Learning rate at the end of the warm-up."})
    save_steps: int = field(default=100, metadata={"help": "Steps between checkpoints."})
    average_decay: float = field(default=0.99, metadata={"help": "Decay of the running average; 0 for none."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "Folder of a checkpoint."})
    use_cpu: bool = field(
        default=False, metadata={"help": "Train on the CPU; several processes without GPUs need it."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of everything."})


def main(argv: list[str] | None = None) -> None:
    groups = (LoopArguments, CompreSSMConfig, CompreSSMSchedule, ModelArguments, DataArguments)
    args, config, schedule, model_args, data_args = parse_arguments(sys.argv[1:] if argv is None else argv, groups)
    if schedule.rollback_tolerance is not None or schedule.monitor_steps is not None:
        raise ValueError("rollback_tolerance and monitor_steps need the callback: use pretrain.py, or leave them out.")
    data_configuration = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=args.use_cpu, dataloader_config=data_configuration)
    set_seed(args.seed)
    install_scan()
    with accelerator.main_process_first():
        train_text, _ = load_text(data_args, args.seed)
    tokenizer = load_tokenizer(model_args, train_text, data_args.text_column)
    with accelerator.main_process_first():
        dataset = tokenized(train_text, tokenizer, data_args)
    model, history, done = build_model(model_args, tokenizer), History(config.to_dict(), asdict(schedule)), 0
    if args.resume_from_checkpoint:  # optimizer and wrapper are built for these sizes, so they come first
        history = load_history(args.resume_from_checkpoint)
        if history.state_sizes:
            set_state_sizes(model, history.state_sizes, is_prepared=False)
        done = int(Path(args.resume_from_checkpoint).name.rpartition("-")[2])
    keep_average = args.average_decay > 0 and accelerator.distributed_type != "FSDP"
    average_function = get_ema_multi_avg_fn(args.average_decay)
    average = AveragedModel(model, multi_avg_fn=average_function).to(accelerator.device) if keep_average else None
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), args.learning_rate, betas=(0.9, 0.95))
    loader = DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True, collate_fn=default_data_collator)
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.max_steps // 20, args.max_steps)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(scheduler, *([average] if keep_average else []))
    if done:
        accelerator.load_state(args.resume_from_checkpoint)

    event_steps = schedule.event_steps(args.max_steps)[len(history.events) :]  # what was done counts
    model.train()
    for step, batch in zip(range(done + 1, args.max_steps + 1), batches_from(done, loader, accelerator), strict=False):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if keep_average:
            average.update_parameters(accelerator.unwrap_model(model))
        if step in event_steps:
            processes = accelerator.process_index, accelerator.num_processes
            draw = (config.calibration_batches, config.calibration_seed, step, *processes)
            calibration = draw_batches(dataset, default_data_collator, args.batch_size, *draw)
            events_left = len(event_steps) - event_steps.index(step)
            size = reducible_size(config, state_layers(accelerator.unwrap_model(model)))
            goal = config.for_event(size, events_left, history.loss_spent)
            report = analyze(model, calibration, goal)  # the model is the wrapped one, since every process takes part
            event = compress(model, report, optimizer, step=step, companions=[average] if keep_average else [])
            history.events.append(event)
            accelerator.print(f"\nstep {step}\n{report}\n")
        if step % 20 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.4f}")
        if step % args.save_steps == 0 or step == args.max_steps:
            save(Path(args.output_dir) / f"checkpoint-{step}", history, accelerator)

    weights = accelerator.get_state_dict(model)  # sharded weights are gathered
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir, state_dict=weights)
        tokenizer.save_pretrained(args.output_dir)
        save_history(history, args.output_dir)
    accelerator.print(f"State sizes {list((history.state_sizes or {}).values())}. Saved in {args.output_dir}")
    accelerator.wait_for_everyone()  # the first to leave would take down the others' connections
    accelerator.end_training()


def batches_from(done: int, loader, accelerator) -> Iterator[dict]:
    """Yield the batches of step `done` + 1 and of all later ones, epoch after epoch."""
    epoch, skipped = divmod(done, len(loader))
    while True:
        loader.set_epoch(epoch)
        yield from accelerator.skip_first_batches(loader, skipped) if skipped else loader
        epoch, skipped = epoch + 1, 0


def save(folder: Path, history: History, accelerator: Accelerator) -> None:
    """Save what training needs to go on; the history comes last, and says the state sizes."""
    accelerator.save_state(str(folder))
    if accelerator.is_main_process:
        save_history(history, folder)


if __name__ == "__main__":
    main()
