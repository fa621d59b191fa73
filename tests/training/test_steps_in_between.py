"""At a step after which nothing is due, the callback looks at no module: it decides by the number of the step."""

import sys

import pytest
import torch
from conftest import build_trainer
from transformers import TrainerCallback

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule

OF_MODULES = torch.nn.Module.named_modules.__code__.co_filename


class Counting(CompreSSMCallback):
    """Counts, step by step, the calls of methods of `torch.nn.Module` while the callback works."""

    def on_step_end(self, args, state, control, **kwargs):
        count = 0

        def note(frame, event, argument):
            nonlocal count
            count += event == "call" and frame.f_code.co_filename == OF_MODULES

        self.calls = getattr(self, "calls", {})
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            super().on_step_end(args, state, control, **kwargs)
        finally:
            sys.setprofile(before)
        self.calls[state.global_step] = count


class Worsening(TrainerCallback):
    """Every evaluation comes out worse than the one before it."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] = state.log_history[-1]["eval_loss"] = 3.0 + state.global_step


@pytest.mark.parametrize("is_attached", [False, True])
@pytest.mark.parametrize(
    ("schedule", "busy"),
    [
        ({"end": 0.5, "events": 2}, {5, 10}),
        ({"end": 0.5, "events": 2, "monitor_steps": 8}, {5, 8, 10, 16}),
        ({"end": 0.9, "trigger": "settled", "monitor_steps": 4, "settled_over": 0.2}, {4, 8, 12, 16, 18, 20}),
    ],
)
def test_a_step_after_which_nothing_is_due_touches_no_module(tmp_path, dataset, schedule, busy, is_attached):
    callback = Counting(CompreSSMConfig(cut_fraction=0.5, calibration_batches=2), CompreSSMSchedule(**schedule))
    trainer = build_trainer(tmp_path, dataset, [] if is_attached else [callback])
    if is_attached:
        callback.attach(trainer)
    trainer.train()
    assert {step for step, count in callback.calls.items() if count} == busy
    assert set(callback.calls) == set(range(1, 21))


def test_after_a_rollback_that_ends_it_no_step_is_due(tmp_path, dataset):
    schedule = CompreSSMSchedule(end=0.5, events=2, rollback_tolerance=0.0)
    callback = Counting(CompreSSMConfig(target_state_size=1, calibration_batches=2), schedule)
    options = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": dataset.select(range(8))}
    build_trainer(tmp_path, dataset, [Worsening(), callback], **options).train()
    assert callback.history.rollbacks == 1
    assert {step for step, count in callback.calls.items() if count} == {5}
