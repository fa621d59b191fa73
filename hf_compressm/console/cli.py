"""The console command `hf-compressm` has six parts: estimate, analyze, compress, export, push, env."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from ..analysis.cost import analysis_cost, seconds_per_pass
from ..architectures import state_layers, state_sizes
from ..architectures.installed_scan import install_scan
from ..config import CompreSSMConfig
from ..plotting import plot_score_map, save_figure
from ..reduction import analyze, compress
from ..report import StateReport
from ..sharing.model_card import CardDetails, write_model_card
from ..sharing.pictures import write_pictures
from ..storage.export import export_bf16, export_mamba_ssm, export_sharded, export_uniform, in_one_dtype
from ..storage.files import check_new, folder_aside, write_json
from ..storage.history import HISTORY_FILE, History, load_history, save_history
from ..storage.loading import language_model_without_weights, load_language_model, local_folder
from .environment import env_report
from .options import add_config_options, config_from
from .text import TEXT_UNIT_HELP, TEXT_UNITS, token_batches

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130  # exit codes, beside 0
FORMATS = ("uniform", "bf16", "sharded", "mamba_ssm")
DESCRIPTION = """Find out what the states of a model do, remove those that do little, share the result.

MODEL is a folder, or the name of a repository on the Hub; in the format of Transformers or of the original mamba_ssm.
"""
EXAMPLES = """examples:
  hf-compressm estimate nvidia/Nemotron-H-8B-Base-8K --target-state-size 16
  hf-compressm analyze runs/mamba --text my.txt --loss-budget 0.01
  hf-compressm compress state-spaces/mamba-130m-hf small --text my.txt --loss-budget 0.02
  hf-compressm export small padded --to uniform --state-size 16
  hf-compressm push small user/mamba-small --license apache-2.0 --private
  hf-compressm env

exit codes: 0 done, 2 bad input (nothing was changed), 1 the work or the Hub failed, 130 interrupted"""
ESTIMATE_HELP = """Say how much memory an analysis of MODEL would take, and how often it would run the model, from
its config alone: no weight is loaded, or fetched from the Hub. What the forward pass of a batch takes for itself
depends on the kernels and is not told; with a goal for which sizes are searched (--loss-budget) there are more."""
EXPORT_HELP = """Write MODEL in the form that another tool wants, into the new folder OUTPUT. The logits are compared
with those of MODEL before anything is called done.

  uniform    one state size for all layers: smaller ones are padded with states that do nothing, exactly. For tools
             that know one number for all layers, such as vLLM, which reads a scalar state_size, or that have kernels
             for some sizes: llama.cpp's for CUDA want --state-size 16 (Mamba), and 128 or 256 (Mamba-2, hybrids).
  bf16       weights in bfloat16.
  sharded    safetensors files of at most --max-shard-size.
  mamba_ssm  config.json and pytorch_model.bin as mamba_ssm's MambaLMHeadModel reads them; padded to one size. For
             Mamba and Mamba-2; not for balanced states, which mamba_ssm does not know."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    options = _parser().parse_args(argv)
    try:
        options.run(options)
    except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
        print(f"hf-compressm {options.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except (RuntimeError, OSError, HfHubHTTPError, SafetensorError) as error:
        print(f"hf-compressm {options.command} failed: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def run_estimate(options: argparse.Namespace) -> None:
    """Show what an analysis would take, from the config alone."""
    config = config_from(options)
    model = language_model_without_weights(options.model)
    print(analysis_cost(state_layers(model), config, options.batch_size, options.length))


def run_analyze(options: argparse.Namespace) -> None:
    """Show what each layer's states do, as table, JSON and picture."""
    if options.output is not None and options.output.exists() and not options.output.is_dir():
        raise FileExistsError(f"{options.output} exists and is not a folder; give another.")
    _, report = _analyzed(options, *_checked(options))
    print(report)
    if options.output is not None:
        content = report_content(report)
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(options.output / "analysis.json", content)
        save_figure(plot_score_map(_sorted_scores(report), report.state_sizes), options.output / "scores.png")
        print(f"Written to {options.output}: analysis.json, scores.png")


def run_compress(options: argparse.Namespace) -> None:
    """Cut a trained model, and save it with its history, pictures and card."""
    check_new(options.output)
    config, source = _checked(options)
    history = load_history(source) if (source / HISTORY_FILE).exists() else History(config.to_dict())
    model, report = _analyzed(options, config, source)
    print(report)
    history.events.append(compress(model, report))
    with folder_aside(options.output) as folder:
        in_one_dtype(model).save_pretrained(folder)
        AutoTokenizer.from_pretrained(options.tokenizer or source).save_pretrained(folder)
        save_history(history, folder)
        write_pictures(folder, history)
        base = options.model if not Path(options.model).is_dir() else None
        write_model_card(folder, options.output.name, CardDetails(base_model=base))
    if not report.is_cut:
        print("Nothing could be cut within this goal; the model was saved as it was.")
    sizes = sorted(set(state_sizes(model).values()))
    print(f"Saved in {options.output}: N = {', '.join(map(str, sizes))}")


def run_export(options: argparse.Namespace) -> None:
    """Write the same model in another form."""
    if options.state_size is not None and options.to != "uniform":
        raise ValueError(f"--state-size {options.state_size} is for --to uniform; got --to {options.to}.")
    exporters: dict[str, Callable] = {
        "uniform": lambda source: export_uniform(source, options.output, options.state_size),
        "bf16": lambda source: export_bf16(source, options.output),
        "sharded": lambda source: export_sharded(source, options.output, options.max_shard_size),
        "mamba_ssm": lambda source: export_mamba_ssm(source, options.output),
    }
    print(exporters[options.to](local_folder(options.model)))


def run_push(options: argparse.Namespace) -> None:
    """Push a reduced model to the Hub, with card and metadata."""
    from ..sharing.hub import push_folder

    details = CardDetails(license=options.license, base_model=options.base_model, datasets=options.datasets)
    commit = push_folder(
        options.folder, options.repo_id, details, options.private or None, options.revision, options.create_pr
    )
    print(commit.pr_url or commit.commit_url)


def run_env(options: argparse.Namespace) -> None:
    """Show what a report of a problem should say."""
    install_scan()
    for name, value in env_report().items():
        print(f"{name:22} {value}")


def report_content(report: StateReport) -> dict:
    """Return a report as JSON types, with the scores and the spectrum of each layer descending."""
    scores = _sorted_scores(report)
    layers = [
        {
            "layer": index,
            "state_size": before,
            "proposed_state_size": report.state_sizes[index],
            "score_discarded": report.score_discarded[index],
            "predicted_error": report.predicted_error.get(index),
            "single_layer_loss_change": report.single_layer_loss_change.get(index),
            "scores": scores[index].tolist(),
            "hankel_singular_values": report.hankel_singular_values[index].tolist(),
        }
        for index, before in report.state_sizes_before.items()
    ]
    names = ("criterion", "compensate", "is_refitted", "loss_before", "loss_after", "tokens", "seconds")
    recall = {name: getattr(report, name) for name in ("recall_before", "recall_after")}
    measured = {name: getattr(report, name) for name in names}
    measured |= {name: result and asdict(result) for name, result in recall.items()}
    return {"config": report.config.to_dict()} | measured | {"layers": layers}


def _sorted_scores(report: StateReport) -> dict:
    return {index: score.sort(descending=True).values for index, score in report.scores.items()}


def _checked(options: argparse.Namespace) -> tuple[CompreSSMConfig, Path]:
    """Return the configuration, and the folder of the model, which is fetched where it is on the Hub."""
    config = config_from(options)
    _check_device(options.device)
    return config, local_folder(options.model)


def _analyzed(
    options: argparse.Namespace, config: CompreSSMConfig, source: Path
) -> tuple[PreTrainedModel, StateReport]:
    """Return the model and the report; progress is shown on standard error."""
    with tqdm(total=3, desc="reading the text", file=sys.stderr) as progress:
        model = load_language_model(source)
        progress.update()
        tokenizer = options.tokenizer or str(source)
        shape = (config.calibration_batches, options.batch_size, options.length)
        batches = token_batches(options.text, tokenizer, *shape, options.text_column, options.text_unit)
        _check_ids(batches, tokenizer, model)
        progress.update()
        progress.set_description(f"analysing {len(state_sizes(model))} layers")
        model = model.to(options.device)
        cost = analysis_cost(state_layers(model), config, options.batch_size, options.length)
        progress.write(f"{cost}\n{cost.time(seconds_per_pass(model, batches[0]))}", sys.stderr)
        report = analyze(model, batches, config)
        progress.update()
    return model, report


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA raises the latter
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device = {name}; allowed: cpu, or cuda where there is one ({reason}).") from error


def _check_ids(batches: list[dict], tokenizer: str, model: PreTrainedModel) -> None:
    largest, known = max(int(batch["input_ids"].max()) for batch in batches), model.config.vocab_size
    if largest >= known:
        raise ValueError(f"{tokenizer} gives ids up to {largest}, the model has {known} tokens; give its --tokenizer.")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    # An abbreviation that means one option today may mean another, or none, in the next release.
    how = {"formatter_class": raw, "allow_abbrev": False}
    parser = argparse.ArgumentParser("hf-compressm", description=DESCRIPTION, epilog=EXAMPLES, **how)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, **texts) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=run.__doc__, **how, **texts)
        added.set_defaults(run=run)
        return added

    estimate = command("estimate", run_estimate, description=ESTIMATE_HELP)
    analysis = command("analyze", run_analyze, description="Find out what each layer's states do; nothing is changed.")
    reduction = command("compress", run_compress, description="Reduce a trained model, without training.")
    for added in (analysis, reduction):
        added.add_argument("model", metavar="MODEL")
        if added is reduction:
            added.add_argument("output", type=Path, metavar="OUTPUT", help="new folder for the reduced model")
        _add_text_options(added)
    estimate.add_argument("model", metavar="MODEL")
    for added in (estimate, analysis, reduction):
        added.add_argument("--length", type=int, default=512, help="tokens per sequence (default: %(default)s)")
        added.add_argument("--batch-size", type=int, default=4, help="sequences per batch (default: %(default)s)")
        add_config_options(added)
    analysis.add_argument("--output", type=Path, help="folder for analysis.json and scores.png")

    export = command("export", run_export, description=EXPORT_HELP)
    export.add_argument("model", metavar="MODEL")
    export.add_argument("output", type=Path, metavar="OUTPUT", help="new folder")
    export.add_argument("--to", choices=FORMATS, required=True)
    export.add_argument("--state-size", type=int, help="with --to uniform: N to pad to (default: the largest layer's)")
    export.add_argument("--max-shard-size", default="5GB", help="with --to sharded (default: %(default)s)")

    push = command("push", run_push, description="Push a reduced model with its card, pictures and history.")
    push.add_argument("folder", type=Path, metavar="FOLDER")
    push.add_argument("repo_id", metavar="REPO", help="name, or namespace/name")
    push.add_argument("--private", action="store_true", help="for a repository that is made")
    push.add_argument("--revision", help="branch to push to, made where it is missing")
    push.add_argument("--create-pr", action="store_true", help="open a pull request")
    push.add_argument("--license", help="for the card, such as apache-2.0")
    push.add_argument("--base-model", help="for the card: the model that was reduced, on the Hub")
    push.add_argument("--datasets", nargs="*", default=(), help="for the card: what it was trained on, on the Hub")

    command("env", run_env, description="Show versions, devices and the scan that would run; for reports of problems.")
    return parser


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    text = parser.add_argument_group("text")
    text.add_argument("--text", required=True, help="calibration text: a .txt, .jsonl or .parquet file, or a dataset")
    text.add_argument("--text-column", default="text", help="column of the text (default: %(default)s)")
    unit = f"{TEXT_UNIT_HELP} (default: %(default)s)"
    text.add_argument("--text-unit", choices=TEXT_UNITS, default=TEXT_UNITS[0], help=unit)
    text.add_argument("--tokenizer", help="folder or name (default: the model's own)")


if __name__ == "__main__":
    sys.exit(main())
