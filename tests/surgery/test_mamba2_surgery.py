"""A Mamba-2 is cut in the middle of a training: in some of its axes, or in a balanced basis."""

import copy
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from conftest import assert_identical, train_steps, weights_of
from scalar_decay_models import build_mamba2

from hf_compressm import CompreSSMConfig, analyze, compress, parameter_groups, prepare
from hf_compressm.architectures import state_layers, state_sizes
from hf_compressm.surgery.adopt_sizes import adopt_checkpoint_sizes
from hf_compressm.surgery.shrink_and_grow import grow_state, pad_state, set_state_sizes

N = 16
PROJECTIONS = ("B_proj", "C_proj")
CASES = pytest.mark.parametrize(("basis", "prepared"), [("axis", False), ("balanced", False), ("balanced", True)])


def adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3, eps=1e-6)


def trained_mamba2(batches, prepared: bool = False):
    """(model, optimizer) after a few steps."""
    model = build_mamba2()
    if prepared:
        prepare(model)
    optimizer = adamw(model)
    train_steps(model, optimizer, batches[:6])
    return model, optimizer


def planned(model, batches, basis: str, size: int = 5):
    return analyze(model, batches, CompreSSMConfig(target_state_size=size, basis=basis, calibration_batches=4))


@torch.no_grad()
def logits_of(model, batch) -> torch.Tensor:
    return model.eval()(input_ids=batch["input_ids"]).logits


def test_removing_axes_equals_masking_them_before_and_after_training(batches):
    model, optimizer = trained_mamba2(batches)
    masked = copy.deepcopy(model)
    masked_optimizer = adamw(masked)
    masked_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    report, whole = planned(model, batches, "axis"), logits_of(model, batches[0])
    compress(model, report, optimizer)

    layers = state_layers(masked)
    for index, mixer in layers.items():
        for path, value in layers.family.masked(mixer, report.plan[index]).items():
            mixer.get_parameter(path).data.copy_(value)
        for path in layers.family.paths(mixer):
            kept = layers.family.source_index(mixer, path, report.plan[index].kept_states)
            for moment in ("exp_avg", "exp_avg_sq"):
                state = masked_optimizer.state[mixer.get_parameter(path)][moment]
                state.copy_(torch.zeros_like(state).index_copy_(0, kept, state.index_select(0, kept)))

    def assert_close():
        logits = logits_of(model, batches[0])
        torch.testing.assert_close(logits, logits_of(masked, batches[0]), rtol=0, atol=1e-5)
        return logits

    assert (assert_close() - whole).abs().max() > 1e-3  # the cut matters
    losses = [train_steps(each, one, batches[:5]) for each, one in ((model, optimizer), (masked, masked_optimizer))]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    assert_close()


@contextmanager
def projected_readout(model, plan):
    """Within the block a plain model reads C ← Wᵀ V C: what each layer's scan is given, in one forward pass."""
    modeling, entries = state_layers(model).family.modeling, iter(plan.values())
    scan = modeling.mamba2_chunk_scan

    def projecting(x, time_step, A, B, C, **options):
        W, V = map(next(entries).tensors.get, PROJECTIONS)
        return scan(x, time_step, A, B, torch.einsum("grn,grm,blgm->blgn", W.float(), V.float(), C), **options)

    modeling.mamba2_chunk_scan = projecting
    yield
    modeling.mamba2_chunk_scan = scan


def test_a_balanced_cut_computes_as_a_projected_read_out_and_trains_as_zero_padded_projections(batches):
    model, optimizer = trained_mamba2(batches)
    padded = copy.deepcopy(model)
    padded_optimizer = adamw(padded)
    padded_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    report, whole = planned(model, batches, "balanced"), logits_of(model, batches[0])
    with projected_readout(padded, report.plan):
        expected = logits_of(padded, batches[0])
    assert (expected - whole).abs().max() > 1e-3  # the cut matters
    compress(model, report, optimizer)
    torch.testing.assert_close(logits_of(model, batches[0]), expected, rtol=0, atol=1e-5)

    prepare(padded, padded_optimizer)
    for index, mixer in state_layers(padded).items():
        mixer.reduced_state_size = N  # it projects, though to no fewer states
        for path, rows in report.plan[index].tensors.items():
            mixer.get_parameter(path).data.zero_()[:, :5] = rows
    losses = [train_steps(each, one, batches[:5]) for each, one in ((model, optimizer), (padded, padded_optimizer))]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_of(model, batches[0]), logits_of(padded, batches[0]), rtol=0, atol=1e-5)
    for small, large in zip(state_layers(model).values(), state_layers(padded).values(), strict=True):
        for path in PROJECTIONS:
            whole = large.get_parameter(path)
            torch.testing.assert_close(small.get_parameter(path), whole[:, :5], rtol=0, atol=1e-5)
            assert not whole[:, 5:].any()


def rows_kept(path: str, kept: torch.Tensor, size: int) -> torch.Tensor:
    """Where the entries of a tensor stood that stay: z (in_proj), x, B and C of two groups, and Δ (in_proj)."""
    first = 128 if path.startswith("in_proj") else 64
    states = [first + block * size + kept[block % 2] for block in range(4)]
    last = first + 4 * size
    return torch.cat(
        [torch.arange(first), *states, torch.arange(last, last + 4 if path.startswith("in_proj") else last)]
    )


@CASES
def test_moments_are_sliced_or_start_afresh_and_the_next_step_moves_every_tensor(batches, basis, prepared):
    model, optimizer = trained_mamba2(batches, prepared)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))  # it counts the groups
    for before, after in ((N, 8), (8, 5)):
        report = planned(model, batches, basis, after)
        old = {name: (parameter, optimizer.state.get(parameter)) for name, parameter in model.named_parameters()}
        compress(model, report, optimizer)
        layers, changed = state_layers(model), {}
        assert set(layers.sizes.values()) == {after}
        for index in layers:
            for path, parameter in layers.parameters(index).items():
                changed[name] = parameter if (name := layers.parameter_name(index, path)) else None
                if basis == "balanced":
                    assert parameter not in optimizer.state
                    continue
                rows = rows_kept(path, report.kept_states[index], before)
                assert torch.equal(parameter, old[name][0][rows])
                for moment in ("exp_avg", "exp_avg_sq"):
                    assert torch.equal(optimizer.state[parameter][moment], old[name][1][moment][rows])
        unchanged = {name: parameter for name, parameter in model.named_parameters() if name not in changed}
        assert all(parameter is old[name][0] for name, parameter in unchanged.items())
        weights = weights_of(model)
        train_steps(model, optimizer, batches[:1])
        schedule.step()
        for name, parameter in model.named_parameters():
            moved = (parameter != weights[name]).flatten(1 if parameter.ndim > 1 else 0).any(-1)
            assert moved.all() or name not in changed, name
            assert moved.any(), name


def test_a_balanced_parameter_joins_the_group_that_is_not_decayed(batches):
    model, optimizer = trained_mamba2(batches)
    compress(model, planned(model, batches, "balanced"), optimizer)
    decayed, others = (set(group["params"]) for group in optimizer.param_groups)
    of_layers = {mixer.get_parameter(path) for mixer in state_layers(model).values() for path in PROJECTIONS}
    assert of_layers <= others and not of_layers & decayed
    assert of_layers <= set(parameter_groups(model, 0.1)[1]["params"])


@CASES
def test_a_loop_of_ones_own_with_accelerate_goes_on_from_its_saved_state(tmp_path, batches, basis, prepared):
    """Saved before the first cut and after it; a loop that is to be resumed prepares its model itself."""

    def build(seed):
        model = build_mamba2(seed)
        if prepared:
            prepare(model)
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, adamw(model))

    def go_on(model, optimizer, first):
        for step in range(first, 6):
            if step in (2, 4):
                compress(model, planned(model, batches, basis, 12 - 2 * step), optimizer)
            train_steps(model, optimizer, [batches[step]])
            if first == 0:
                accelerator.save_state(tmp_path / str(step))

    accelerator, model, optimizer = build(0)
    go_on(model, optimizer, 0)
    assert set(state_sizes(model).values()) == {4}
    if basis == "balanced" and not prepared:
        return
    for step in (0, 2, 4):
        resumed_accelerator, resumed, resumed_optimizer = build(1)
        adopt_checkpoint_sizes(resumed, resumed_optimizer)
        resumed_accelerator.load_state(tmp_path / str(step))
        go_on(resumed, resumed_optimizer, step + 1)
        assert_identical(weights_of(resumed), weights_of(model))


def test_preparing_changes_nothing_but_the_class(batches):
    plain, _ = trained_mamba2(batches)
    model, optimizer = trained_mamba2(batches, prepared=True)
    weights = weights_of(model)
    assert not any(
        path in name and p in optimizer.state for name, p in model.named_parameters() for path in PROJECTIONS
    )
    assert_identical({n: w for n, w in weights.items() if not n.endswith(PROJECTIONS)}, weights_of(plain))
    for mixer in state_layers(model).values():
        assert torch.equal(mixer.B_proj, torch.eye(N).expand(2, N, N)) and mixer.B_proj.grad is None
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert set(held) == set(model.parameters())
    prepare(model, optimizer)  # once more
    assert held == [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert type(model).__name__ == "CompreSSMMamba2ForCausalLM" and model.config.model_type == "compressm_mamba2"
    assert_identical(weights_of(model), weights)


def test_back_at_its_whole_size_a_layer_does_not_project(batches):
    model, optimizer = trained_mamba2(batches, prepared=True)
    weights, logits = weights_of(model), logits_of(model, batches[0])
    compress(model, planned(model, batches, "balanced"), optimizer)
    assert (logits_of(model, batches[0]) - logits).abs().max() > 1e-3
    set_state_sizes(model, {0: N, 1: N}, optimizer)
    model.load_state_dict(weights)
    assert torch.equal(logits_of(model, batches[0]), logits)
    train_steps(model, optimizer, batches[:1])
    assert all(mixer.B_proj.grad is None for mixer in state_layers(model).values())
    assert model.config.balanced_state_size is None


def test_a_balanced_state_is_padded_to_less_than_its_whole_size(batches):
    model, optimizer = trained_mamba2(batches)
    compress(model, planned(model, batches, "balanced"), optimizer)
    logits = logits_of(model, batches[0])
    pad_state(model, 8)
    assert state_sizes(model) == {0: 8, 1: 8} and model.config.balanced_state_size == 8
    torch.testing.assert_close(logits_of(model, batches[0]), logits, rtol=0, atol=1e-5)
    weights = weights_of(model)
    for size in (N, N + 4):
        with pytest.raises(
            ValueError, match=rf"layer 0 has 16 states .* cannot be padded to {size} .*give at most 15"
        ):
            pad_state(model, size)
    with pytest.raises(ValueError, match="balanced Mamba-2 cannot grow; use pad_state"):
        grow_state(model, 12)
    assert_identical(weights_of(model), weights)


def test_axes_are_padded_and_grown_and_new_ones_learn(batches):
    model, optimizer = trained_mamba2(batches)
    compress(model, planned(model, batches, "axis", 8), optimizer)
    logits = logits_of(model, batches[0])
    pad_state(model, 10)
    torch.testing.assert_close(logits_of(model, batches[0]), logits, rtol=0, atol=1e-5)
    grow_state(model, 12, adamw(model), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_of(model, batches[0]), logits, rtol=0, atol=1e-5)
    weights = weights_of(model)
    train_steps(model, adamw(model), batches[:2])
    for index, mixer in state_layers(model).items():
        rows = mixer.in_proj.weight[128 + 2 * 12 : 128 + 4 * 12].view(2, 12, -1)  # of C
        before = weights[f"backbone.layers.{index}.mixer.in_proj.weight"][128 + 2 * 12 : 128 + 4 * 12].view(2, 12, -1)
        moved = (rows != before).any(-1)
        assert moved[:, :8].all() and moved[:, 10:].all()
