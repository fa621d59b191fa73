"""A Zamba's layers have heads, each a Mamba by itself: it keeps states of its own."""

import pytest
import torch
from conftest import train_steps, weights_of
from mamba1_models import build_zamba, logits_of, make_twins, trained_on
from transformers.optimization import Adafactor

from hf_compressm import CompreSSMConfig, analyze, compress, parameter_groups
from hf_compressm.architectures import state_layers, state_sizes
from hf_compressm.sharing.model_card import write_model_card
from hf_compressm.storage.history import History, load_history, save_history
from hf_compressm.surgery.shrink_and_grow import grow_state, pad_state, shrink_state
from hf_compressm.theory.plan import HeadSelection, Selection


@pytest.fixture
def zamba(batches):
    return trained_on(build_zamba(), batches)


def test_each_head_keeps_its_own_states_and_they_make_up_for_its_dropped_ones(batches):
    model = build_zamba()
    make_twins(model)  # n and n + 8
    expected = logits_of(model, batches[0]["input_ids"])
    kept = torch.arange(8), torch.tensor([3, 4, 5, 6, 7, 8, 9, 10])
    predictions = [torch.zeros(8, 8, dtype=torch.float64) for _ in kept]
    for keep, prediction in zip(kept, predictions, strict=True):
        dropped = [n for n in range(16) if n not in keep]
        for row, n in enumerate(dropped):
            prediction[row, keep.tolist().index((n + 8) % 16)] = 1
    before = weights_of(model)
    selection = HeadSelection(tuple(map(Selection, kept, predictions)))
    shrink_state(model, dict.fromkeys(state_layers(model), selection))
    torch.testing.assert_close(logits_of(model, batches[0]["input_ids"]), expected, rtol=1e-5, atol=1e-5)
    name = "model.layers.1.mamba_decoder.mamba.A_log"
    for head, keep in enumerate(kept):
        assert torch.equal(model.get_parameter(name)[head], before[name][head][:, keep])


def test_states_are_chosen_and_recorded_by_head(zamba, batches, tmp_path):
    report = analyze(zamba, batches, CompreSSMConfig(target_state_size=5, refit=True, calibration_batches=9))
    count = sum(parameter.numel() for parameter in zamba.parameters())
    for index, scores in report.scores.items():
        assert scores.shape == (2, 16) and report.hankel_singular_values[index].shape == (16,)
        for head, keep in enumerate(report.kept_states[index]):
            assert sorted(scores[head].topk(5).indices.tolist()) == keep.tolist()
    assert any(not torch.equal(*kept) for kept in report.kept_states.values())
    history = History({}, events=[compress(zamba, report)])
    zamba.save_pretrained(tmp_path)
    save_history(history, tmp_path)
    assert load_history(tmp_path).events[0].kept_states == history.events[0].kept_states
    card = str(write_model_card(tmp_path, "me/zamba"))
    assert "A Zamba language model" in card
    removed = 4 * 11 * 3 * 64  # four layers, eleven states, and of each two rows and a column of decay rates
    assert count - removed == sum(parameter.numel() for parameter in zamba.parameters())
    assert f"| parameters | {count / 1e6:.2f} M |" in card
    assert "| state per sequence (float32) | 16 KiB | 5.0 KiB |" in card


def test_moments_of_each_head_are_taken_where_its_states_were(batches):
    model = build_zamba()
    optimizers = [
        torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3),
        Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False),
    ]
    for optimizer in optimizers:
        train_steps(model, optimizer, batches[:2])
    mixer = model.model.layers[0].mamba
    rank, adam, factored = mixer.time_step_rank, *(each.state[mixer.x_proj_weight] for each in optimizers)
    moment, row, column = adam["exp_avg"], factored["exp_avg_sq_row"], factored["exp_avg_sq_col"]
    report = analyze(model, batches, CompreSSMConfig(target_state_size=4))
    compress(model, report, optimizers)
    adam, factored = (each.state[mixer.x_proj_weight] for each in optimizers)
    for head, kept in enumerate(report.kept_states[0]):
        positions = [*range(rank), *(rank + kept).tolist(), *(rank + 16 + kept).tolist()]
        assert torch.equal(adam["exp_avg"][head], moment[head, positions])
        assert torch.equal(factored["exp_avg_sq_row"][head], row[head, positions])
    assert torch.equal(factored["exp_avg_sq_col"], column)
    before = mixer.x_proj_weight.detach().clone()
    for optimizer in optimizers:
        train_steps(model, optimizer, batches[2:3])
    assert not torch.equal(before, mixer.x_proj_weight)


def test_padding_leaves_the_function_alone_and_what_is_no_matrix_is_not_decayed(zamba, batches):
    decayed, others = (set(group["params"]) for group in parameter_groups(zamba, 0.1))
    mixer = zamba.model.layers[0].mamba
    assert {mixer.A_log, mixer.D, mixer.dt_proj_bias} <= others
    assert {mixer.x_proj_weight, mixer.dt_proj_weight} <= decayed
    expected = logits_of(zamba, batches[0]["input_ids"])
    pad_state(zamba, 24)
    assert set(state_sizes(zamba).values()) == {24}
    torch.testing.assert_close(logits_of(zamba, batches[0]["input_ids"]), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="cannot grow"):
        grow_state(zamba, 32)


def test_a_refit_lowers_the_loss_of_a_deep_cut(zamba, batches):
    losses = []
    for refit in (False, True):
        config = CompreSSMConfig(target_state_size=1, refit=refit, compensate=False, calibration_batches=9)
        report = analyze(zamba, batches, config)
        losses.append(report.loss_after)
        assert report.is_refitted <= refit
    assert report.is_refitted and any(head.refit is not None for head in report.plan[0].heads)
