"""A reduction has two steps: `analyze` makes a plan and changes nothing, `compress` carries it out.

The callback, the scripts and any hand-written training loop all go through these two functions.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial

from torch import Tensor, nn

from .analysis.allocation import choose_sizes
from .analysis.calibration import undisturbed
from .analysis.checks import allocation_of, can_measure_losses, check_config, split_batches
from .analysis.losses import LossMeter
from .analysis.masking import masked_parameters
from .analysis.objective import Loss, Objective
from .analysis.recall import RecallProbe
from .analysis.states import StateAnalysis, analyze_states
from .architectures import StateLayers, state_sizes
from .architectures.installed_scan import scan_installed
from .config import CompreSSMConfig
from .engines import from_first_process, raise_in_all_processes, unwrap
from .report import StateReport
from .storage.records import ReductionEvent
from .surgery.basis import in_basis, prepared_for
from .surgery.checks import check_state_tensors
from .surgery.shrink_and_grow import shrink_state
from .theory.criteria import is_conditional, scores_by_rank, squared_errors
from .theory.plan import plan_fingerprint


def analyze(
    model: nn.Module, batches: Iterable[dict] | None, config: CompreSSMConfig, loss: Loss | None = None
) -> StateReport:
    """Measure what each state does and plan which to keep, without changing weights, mode or random states.

    A Mamba is analysed on data: every other calibration batch feeds the statistics, losses are measured on the rest.
    With a refit, one batch in three is for statistics and the fit, one decides whether it stays, one gives losses.
    An LRU is analysed from its weights; batches, where given, all serve to measure losses. Of several processes each
    calls this with batches of its own: statistics and losses are taken over all of them, and all get the same plan.

    Args:
        model: a supported Transformers model, any floating dtype. Weights are taken in float32 at least; forward
            passes run as the model's own do, so in autocast inside Trainer(bf16=True).
        batches: dicts of tensors, arrays or lists (`input_ids` or `input_values`, optional `attention_mask`,
            `labels`), of which the first `config.calibration_batches` are read. A DataLoader will do, and so will the
            tokenised rows of a data set, each a batch of one. None will do for an LRU without losses.
        config: what to keep.
        loss: the loss that the model is trained for, if it is not the model's own loss of a batch with `labels`: a
            function of the model and a batch that returns the mean loss, a scalar tensor, and the number of terms that
            it is the mean of. It runs the model that it is given, under which parameters are exchanged meanwhile.

    Raises:
        ValueError: the model is not supported, the configuration does not fit it, there is too little data, a loss has
            to decide and is not known, a value is NaN or Inf, or the target is above the present size.
    """
    started = time.perf_counter()
    model, config_of_first = unwrap(model), from_first_process(config.to_dict())
    with ExitStack() as stack:
        with raise_in_all_processes():
            if config.to_dict() != config_of_first:
                raise ValueError(
                    f"the processes were given different configurations: {config_of_first} and {config.to_dict()}."
                )
            layers = stack.enter_context(in_basis(model, config.basis))
            check_state_tensors(layers)
            check_config(config, layers)
        return _analyze(layers, batches, config, Objective(model, loss), started)


def _analyze(
    layers: StateLayers, batches: Iterable[dict] | None, config: CompreSSMConfig, objective: Objective, started: float
) -> StateReport:
    """Do what `analyze` says, of layers in the basis of the configuration."""
    model, sizes = layers.model, layers.sizes
    statistics_batches, held_out, others = split_batches(layers, batches, config)
    with raise_in_all_processes():
        loss_batches = others if can_measure_losses(config, objective, others) else []

    with undisturbed(model), scan_installed():
        analysis = analyze_states(layers, statistics_batches, config, objective, held_out)
        losses = LossMeter(layers, loss_batches, objective) if loss_batches else None
        allocation = allocation_of(config, layers)
        chosen = choose_sizes(
            config,
            {index: scores_by_rank(scores) for index, scores in analysis.scores.items()},
            allocation,
            loss_of=lambda some: losses.loss(analysis.plan(sizes | some)),
            errors=_squared_errors(analysis, config) if allocation == "global" else None,
        )
        plan = from_first_process({index: entry.cpu() for index, entry in analysis.plan(chosen).items()})
        spectra = analysis.hankel_singular_values()
        recall = (
            RecallProbe(model, config.recall_pairs, partial(masked_parameters, layers))
            if config.recall_pairs
            else None
        )
        loss_before = losses.loss({}) if losses else None
        loss_after = losses.loss(plan) if losses else None
        recall_before, recall_after = (recall.measure({}), recall.measure(plan)) if recall else (None, None)
        predicted = {index: losses.single_layer_change(index, plan) for index in plan} if losses else {}

    return StateReport(
        config=config,
        plan=plan,
        state_sizes_before=sizes,
        criterion=analysis.criterion,
        compensate=analysis.compensate,
        scores=analysis.scores,
        hankel_singular_values=spectra,
        loss_before=loss_before,
        loss_after=loss_after,
        single_layer_loss_change=predicted,
        predicted_error=analysis.predicted_errors(plan),
        recall_before=recall_before,
        recall_after=recall_after,
        tokens=analysis.tokens,
        seconds=time.perf_counter() - started,
        measuring_seconds=losses.seconds if losses else 0.0,
    )


def _squared_errors(analysis: StateAnalysis, config: CompreSSMConfig) -> dict[int, Tensor]:
    """Return layer → squared error of the states that go when the r strongest stay, r = 0 … N, (N + 1,)."""
    discounts = analysis.compensate and not is_conditional(config.criterion)
    covariances = analysis.covariances if discounts else dict.fromkeys(analysis.scores)
    return {
        index: squared_errors(scores, analysis.score_power, covariances[index])
        for index, scores in analysis.scores.items()
    }


def compress(
    model: nn.Module,
    report: StateReport,
    optimizer=None,
    step: int | None = None,
    companions: Sequence[nn.Module] = (),
) -> ReductionEvent:
    """Carry out the plan of `analyze` in place, all of it or none.

    Args:
        model: the model that was analysed; its sizes must be the same since.
        report: the plan; it can be applied once.
        optimizer: the optimizer that trains the model, if one does, or a list of several; their state is cut with the
            model, and so is that of optimizers inside, as Lookahead and SAM have them.
        step: optimizer steps done so far, for the record.
        companions: models of the same shape that are cut too, say a `torch.optim.swa_utils.AveragedModel` of this one.

    Returns:
        The entry for the history.

    Raises:
        ValueError: the report was applied before or made for other sizes, or `shrink_state` refuses the cut.
    """
    started = time.perf_counter()
    sizes, fingerprint = state_sizes(unwrap(model)), from_first_process(plan_fingerprint(report.plan))
    with raise_in_all_processes():
        if report.applied:
            raise ValueError("this report has been applied already; call analyze again.")
        if sizes != report.state_sizes_before:
            raise ValueError(
                f"the report was made for state sizes {report.state_sizes_before}, the model has {sizes}; "
                "call analyze again."
            )
        if plan_fingerprint(report.plan) != fingerprint:
            raise ValueError("this process was given another plan than the first; let all call analyze together.")
    try:
        report.applied = True
        if report.is_cut:
            with prepared_for(report.config.basis, model, optimizer, companions):
                shrink_state(model, report.plan, optimizer, companions)
    except BaseException:
        report.applied = state_sizes(unwrap(model)) != sizes  # an interrupt may come just after the cut
        raise
    return ReductionEvent(
        step=step,
        layers=list(sizes),
        state_sizes_before=list(sizes.values()),
        state_sizes_after=list(report.state_sizes.values()),
        kept_states=[keep.tolist() for keep in report.kept_states.values()],
        score_discarded=list(report.score_discarded.values()),
        single_layer_loss_change=list(report.single_layer_loss_change.values()) or None,
        predicted_error=list(report.predicted_error.values()) or None,
        loss_before=report.loss_before,
        loss_after=report.loss_after,
        tokens=report.tokens,
        seconds=report.seconds + time.perf_counter() - started,
        measuring_seconds=report.measuring_seconds,
        criterion=report.criterion,
        compensate=report.compensate,
        refit=report.is_refitted,
        hankel_singular_values=[spectrum.cpu() for spectrum in report.hankel_singular_values.values()],
        goal=report.config.goal,
        recall_before=report.recall_before and asdict(report.recall_before),
        recall_after=report.recall_after and asdict(report.recall_after),
    )
