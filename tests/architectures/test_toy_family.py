"""A new architecture is one family: a toy that is registered here goes through everything, and no file changes."""

import pytest
import torch
from conftest import assert_identical, train_steps, weights_of
from toy_family import ToyFamily, toy_registered  # noqa: F401, a fixture
from toy_ssm import ToyConfig, ToyForCausalLM
from transformers import set_seed

from hf_compressm import CompreSSMConfig, analyze, compress, parameter_groups
from hf_compressm.architectures import state_layers, state_sizes
from hf_compressm.architectures.family import Block, StateTensor
from hf_compressm.sharing.model_card import write_model_card
from hf_compressm.storage.checkpoint import check_checkpoint
from hf_compressm.storage.history import History, load_history, save_history
from hf_compressm.storage.loading import load_language_model

pytestmark = pytest.mark.usefixtures("toy_registered")


@pytest.fixture
def toy() -> ToyForCausalLM:
    set_seed(0)
    return ToyForCausalLM(ToyConfig())


def optimizer_of(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3)


def test_its_layers_are_found_with_the_gaps_between_them(toy):
    assert state_sizes(toy) == {1: 8, 3: 8}
    decayed, others = (set(group["params"]) for group in parameter_groups(toy, 0.1))
    assert toy.layers[1].log_decay in others and toy.layers[1].maps in decayed


def test_a_cut_keeps_what_the_plan_measured_and_the_optimizer_goes_on(toy, batches):
    optimizer = optimizer_of(toy)
    train_steps(toy, optimizer, batches)
    report = analyze(toy, batches, CompreSSMConfig(target_state_size=3, refit=True, calibration_batches=6))
    assert report.is_refitted and report.loss_after - report.loss_before < 0.05
    moment = optimizer.state[toy.layers[3].log_decay]["exp_avg"].clone()
    event = compress(toy, report, optimizer)
    assert state_sizes(toy) == {1: 3, 3: 3} and toy.config.states == 3 and event.state_sizes_after == [3, 3]
    kept = report.kept_states[3]
    assert torch.equal(optimizer.state[toy.layers[3].log_decay]["exp_avg"], moment[:, kept])
    losses = [toy.eval()(**batch).loss.item() for batch in batches[2:6:3]]
    assert sum(losses) / 2 == pytest.approx(report.loss_after, abs=1e-5)
    before = weights_of(toy)
    train_steps(toy, optimizer, batches[:1])
    for name in ("maps", "log_decay"):
        assert not torch.equal(before[f"layers.1.{name}"], toy.layers[1].get_parameter(name))


@pytest.mark.parametrize("criterion", ["second_moment", "taylor", "aire"])
def test_every_kind_of_score_ranks_its_states(toy, batches, criterion):
    config = CompreSSMConfig(loss_budget=0.02, criterion=criterion)
    report = analyze(toy, batches, config)
    assert report.loss_after <= report.loss_before + 0.02 and set(report.scores) == {1, 3}


def test_it_is_saved_checked_described_and_loaded(toy, batches, tmp_path):
    history = History({}, events=[compress(toy, analyze(toy, batches, CompreSSMConfig(target_state_size=3)))])
    toy.save_pretrained(tmp_path)
    save_history(history, tmp_path)
    assert check_checkpoint(tmp_path) == {1: 3, 3: 3} == state_sizes(load_language_model(tmp_path))
    assert_identical(weights_of(load_language_model(tmp_path)), weights_of(toy))
    assert load_history(tmp_path).events[0].kept_states == history.events[0].kept_states
    card = str(write_model_card(tmp_path, "me/toy"))
    assert "A Toy language model" in card and "It is a toy." in card
    removed = 2 * 5 * (2 * 16 + 16)  # two layers, five states: two rows of maps and a column of decay rates each
    count = sum(parameter.numel() for parameter in toy.parameters())
    assert f"| parameters | {(count + removed) / 1e6:.2f} M | {count / 1e6:.2f} M |" in card
    assert "| state per sequence (float32) | 1.0 KiB | 384 B |" in card


def test_sizes_of_its_own_for_each_layer_are_refused_by_name(toy, batches):
    with pytest.raises(ValueError, match="ToyForCausalLM"):
        analyze(toy, batches, CompreSSMConfig(tolerance=0.1, allocation="per_layer"))


def test_states_of_groups_lie_side_by_side(toy):
    """Two groups, a block for both: each group has its own states, kept apart or alike."""
    family, mixer = ToyFamily(), toy.layers[1]
    family.tensors = {
        "maps": StateTensor(axis=0, blocks=(Block("width", per_state=0), Block("B", per_state="groups")))
    }
    mixer.width, mixer.groups, mixer.states = 2, 2, 3
    assert family.axis_length(mixer, "maps") == 8 and family.size_at(mixer, "maps", 12) == 5
    alike = family.source_index(mixer, "maps", torch.tensor([0, 2, -1]))
    assert alike.tolist() == [0, 1, 2, 4, -1, 5, 7, -1]
    apart = family.source_index(mixer, "maps", torch.tensor([[0, 1], [1, 2]]))
    assert apart.tolist() == [0, 1, 2, 3, 6, 7]


def test_the_registry_names_what_it_serves_in_its_refusals():
    with pytest.raises(ValueError, match=r"toy_ssm"):
        state_layers(torch.nn.Linear(1, 1))
