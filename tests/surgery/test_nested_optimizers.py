"""Optimizers that hold others, as people write them, follow a cut: every one of them, with all it keeps."""

import copy

import pytest
import torch
from conftest import build_lru, build_model, build_trainer, losses_of, train_steps
from torch.optim import SGD, AdamW, Muon, Optimizer

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, analyze, compress
from hf_compressm.architectures import state_layers
from hf_compressm.surgery.optimizer_parts import OptimizerParts
from hf_compressm.training.snapshot import Snapshot

CONFIG = CompreSSMConfig(target_state_size=6, calibration_batches=2)


def matrices_and_others(parameters) -> tuple[list, list]:
    parameters = list(parameters)
    return [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]


class MuonAndAdamW(Optimizer):
    """Two optimizers in one, with one list of groups; checkpoints hold both."""

    def __init__(self, parameters):
        matrices, others = matrices_and_others(parameters)
        self.muon, self.adamw = Muon(matrices, lr=1e-3), AdamW(others, lr=1e-3)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    def step(self, closure=None):
        self.muon.step()
        self.adamw.step()

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict):
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]


class Several:
    """The same without a base class, and with groups that are made when they are asked for."""

    def __init__(self, parameters):
        matrices, others = matrices_and_others(parameters)
        self.optimizers = {"muon": Muon(matrices, lr=1e-3), "rest": [AdamW(others, lr=1e-3)]}

    def step(self):
        self.optimizers["muon"].step()
        self.optimizers["rest"][0].step()

    def zero_grad(self):
        self.optimizers["muon"].zero_grad()
        self.optimizers["rest"][0].zero_grad()


class Lookahead(Optimizer):
    """Slow weights in a state of its own, beside that of the optimizer around which it lies (arXiv 1907.08610)."""

    def __init__(self, base, steps=2):
        self.optimizer, self.steps, self.done = base, steps, 0
        self.param_groups, self.fast_state = base.param_groups, base.state
        self.state, self.defaults = {}, base.defaults
        self._optimizer_state_dict_pre_hooks = self._optimizer_state_dict_post_hooks = {}

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        self.done += 1
        for parameter in (p for group in self.param_groups for p in group["params"]):
            slow = self.state.setdefault(parameter, {}).setdefault("slow", parameter.clone())
            if self.done % self.steps == 0:
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)


class OwnTable(Lookahead):
    """Its slow weights are tensors by parameter, in a dict beside the state."""

    def __init__(self, base):
        super().__init__(base)
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        for parameter, slow in self.slow.items():
            slow.lerp_(parameter, 0.5)
            parameter.copy_(slow)


class SAM(Optimizer):
    """It shares the groups of the optimizer inside, and keeps where it came from (arXiv 2010.01412)."""

    def __init__(self, parameters, base, **options):
        super().__init__(parameters, {"rho": 0.05, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter]["old"] = parameter.clone()
            parameter.add_(parameter.grad, alpha=0.0)
            parameter.copy_(self.state[parameter]["old"])
        self.base_optimizer.step()


def two_in_a_list(parameters):
    matrices, others = matrices_and_others(parameters)
    return [Muon(matrices, lr=1e-3), AdamW(others, lr=1e-3)]


class Together:
    """What a loop does with several optimizers in a list."""

    def __init__(self, optimizers):
        self.optimizers = optimizers if isinstance(optimizers, list) else [optimizers]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()


NESTED = {
    "muon and adamw": MuonAndAdamW,
    "several": Several,
    "a list": two_in_a_list,
    "lookahead": lambda parameters: Lookahead(AdamW(parameters, lr=1e-3)),
    "lookahead around two": lambda parameters: Lookahead(MuonAndAdamW(parameters)),
    "own table": lambda parameters: OwnTable(AdamW(parameters, lr=1e-3)),
    "sam": lambda parameters: SAM(parameters, SGD, lr=1e-2, momentum=0.9),
}


def states_of(optimizer, parameter) -> dict:
    """All tensors that are kept of a parameter, by table and key."""
    states = OptimizerParts(optimizer).states(parameter)
    return {(table, key): value for table, state in states.items() for key, value in state.items()}


@pytest.mark.parametrize("kind", NESTED)
def test_all_that_is_kept_of_a_cut_tensor_follows_and_training_goes_on(kind, batches, recwarn):
    model = build_model()
    optimizer = NESTED[kind](model.parameters())
    train_steps(model, Together(optimizer), batches[:3])
    mixer = model.backbone.layers[1].mixer
    before = {key: copy.deepcopy(value) for key, value in states_of(optimizer, mixer.A_log).items()}
    untouched = states_of(optimizer, model.backbone.layers[0].mixer.D)
    assert any(torch.is_tensor(value) and value.shape == mixer.A_log.shape for value in before.values())

    report = analyze(model, batches, CONFIG)
    compress(model, report, optimizer)
    after, kept = states_of(optimizer, mixer.A_log), report.kept_states[1]
    assert after.keys() == before.keys()
    for key, value in before.items():
        follows = torch.is_tensor(value) and value.ndim == 2
        assert torch.equal(torch.as_tensor(after[key]), torch.as_tensor(value[:, kept] if follows else value)), key
    now = states_of(optimizer, model.backbone.layers[0].mixer.D)
    assert now.keys() == untouched.keys() and all(now[key] is untouched[key] for key in now)

    parameters = set(model.parameters())
    parts = OptimizerParts(optimizer)
    assert {p for group in parts.groups.values() for p in group["params"]} == parameters
    assert all(key in parameters for table in parts.tables.values() for key in table)
    weights = mixer.A_log.detach().clone()
    train_steps(model, Together(optimizer), batches[:3])
    assert not torch.equal(mixer.A_log, weights)
    assert not [warning for warning in recwarn if "cannot follow" in str(warning.message)]


@pytest.mark.parametrize("kind", ["lookahead around two", "own table"])
def test_a_snapshot_keeps_and_restores_every_table(kind, batches, tmp_path):
    model = build_model()
    optimizer = NESTED[kind](model.parameters())
    train_steps(model, optimizer, batches[:3])
    before = {name: copy.deepcopy(states_of(optimizer, p)) for name, p in model.named_parameters()}
    snapshot = Snapshot(model, optimizer, tmp_path / "snapshot")
    compress(model, analyze(model, batches, CONFIG), optimizer)
    train_steps(model, optimizer, batches[:3])
    snapshot.restore(model, optimizer)
    after = {name: states_of(optimizer, p) for name, p in model.named_parameters()}
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    train_steps(model, optimizer, batches[:3])


def test_tensors_that_a_truncation_replaces_start_afresh_in_every_table(lru_batches):
    model = build_lru()
    optimizer = NESTED["lookahead around two"](model.parameters())
    train_steps(model, optimizer, lru_batches[:2])
    assert states_of(optimizer, model.model.layers[0].mixer.C)
    compress(model, analyze(model, None, CompreSSMConfig(target_state_size=6)), optimizer)
    assert not states_of(optimizer, model.model.layers[0].mixer.C)
    train_steps(model, optimizer, lru_batches[:2])
    assert states_of(optimizer, model.model.layers[0].mixer.C)


def by_position(parameters):
    optimizer = AdamW(parameters, lr=1e-3)
    optimizer.slow_weights = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]
    return optimizer


def by_id(parameters):
    optimizer = AdamW(parameters, lr=1e-3)
    optimizer.slow = {id(p): torch.zeros(3) for group in optimizer.param_groups for p in group["params"]}
    return optimizer


def in_a_set(parameters):
    optimizer = AdamW(parameters, lr=1e-3)
    optimizer.frozen = {"of": set(optimizer.param_groups[0]["params"][:5])}
    return optimizer


def in_a_group(parameters):
    optimizer = AdamW(parameters, lr=1e-3)
    optimizer.param_groups[0]["p0"] = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    return optimizer


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (by_position, r"Lookahead\.optimizer\.slow_weights\[0\]\[\d+\] belongs to layer 0"),
        (by_id, r"Lookahead\.optimizer\.slow: a key belongs to layer 0"),
        (in_a_set, r"Lookahead\.optimizer\.frozen\.of\[\d\] belongs to layer 0 "),
        (in_a_group, r"Lookahead\.param_groups\[0\]\.p0\[\d+\] belongs to layer 0"),
        (lambda parameters: torch.optim.LBFGS(parameters), "LBFGS keeps state that is tied to whole parameters"),
    ],
)
def test_what_is_not_found_by_a_parameter_is_refused_before_anything(build, where, batches):
    model = build_model()
    optimizer = Lookahead(build(model.parameters()))
    report = analyze(model, batches, CONFIG)
    with pytest.raises(ValueError, match=where):
        compress(model, report, optimizer)
    assert model.config.state_size == 16 and not report.applied


def test_a_schedule_of_the_learning_rate_goes_on(batches):
    model = build_model()
    optimizer = MuonAndAdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train_steps(model, optimizer, batches[:1])
    schedule.step()
    compress(model, analyze(model, batches, CONFIG), optimizer)
    train_steps(model, optimizer, batches[:1])
    schedule.step()
    assert [group["lr"] for group in optimizer.muon.param_groups] == [pytest.approx(1e-3 / 3)]


def test_trainer_with_such_an_optimizer_saves_after_a_cut_and_resumes_exactly(tmp_path, dataset):
    def train(folder, **options):
        trainer = build_trainer(folder, dataset, max_steps=8, save_strategy="steps", save_steps=2)
        schedule = CompreSSMSchedule(end=0.5, events=1)
        callback = CompreSSMCallback(CompreSSMConfig(target_state_size=8, calibration_batches=2), schedule)
        callback.attach(trainer)

        def create_optimizer(*args):
            if trainer.optimizer is None:
                trainer.optimizer = MuonAndAdamW(trainer.model.parameters())
            return trainer.optimizer

        trainer.create_optimizer = create_optimizer
        trainer.train(**options)
        return trainer, callback.history

    whole, history = train(tmp_path / "run")
    assert history.state_sizes == {0: 8, 1: 8}
    saved = torch.load(tmp_path / "run" / "checkpoint-6" / "optimizer.pt")
    momenta = [state["momentum_buffer"].shape for state in saved["muon"]["state"].values()]
    assert len(momenta) == sum(p.ndim == 2 for p in whole.model.parameters()) and torch.Size([64, 8]) in momenta
    again, _ = train(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert losses_of(again)[8] == losses_of(whole)[8]
    for left, right in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(left, right)
    assert set(state_layers(again.model).sizes.values()) == {8}
