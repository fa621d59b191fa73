"""Callbacks that the tests of several rooms give to a Trainer: one that cuts, and those that play fate."""

from transformers import TrainerCallback

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule
from hf_compressm.training.snapshot import Snapshot

SCHEDULE = CompreSSMSchedule(start=0.0, end=0.5, events=2)  # of 20 steps: after 5 and 10


def cutting_callback(companions=(), calibration_loader=None, **config) -> CompreSSMCallback:
    """To four states in two cuts, unless `config` says otherwise."""
    options = {"companions": companions, "calibration_loader": calibration_loader}
    return CompreSSMCallback(CompreSSMConfig(**({"target_state_size": 4} | config)), SCHEDULE, **options)


class WorseAt(TrainerCallback):
    """The evaluation after this step comes out worse; Trainer has put it into its log already."""

    def __init__(self, *steps: int, metric: str = "eval_loss", value: float = 1e9):
        self.steps, self.metric, self.value = steps, metric, value

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.global_step in self.steps:
            metrics[self.metric] = state.log_history[-1][self.metric] = self.value


class SnapshotAndRestore(TrainerCallback):
    """What a rollback does to a run that is never cut."""

    def __init__(self, taken: int, restored: int):
        self.taken, self.restored = taken, restored

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.taken:
            self.snapshot = Snapshot(model, optimizer)

    def on_evaluate(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.restored:
            self.snapshot.restore(model, optimizer)
