"""The Linear Recurrent Unit: recurrence, layer and models agree with plain loops, and live in Transformers."""

import math

import pytest
import torch
from conftest import VOCABULARY, assert_identical, build_lru, build_trainer, label_of, losses_of, weights_of
from datasets import Dataset
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, set_seed

from hf_compressm import LRUConfig, LRUForSequenceClassification, LRUModel
from hf_compressm.architectures.time_invariant.lru import modeling_lru
from hf_compressm.architectures.time_invariant.lru.linear_recurrence import linear_recurrence
from hf_compressm.architectures.time_invariant.lru.modeling_lru import LRUMixer


def recurrence_loop(eigenvalues: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    state, states = torch.zeros_like(inputs[:, 0]), []
    for drive in inputs.unbind(1):
        state = eigenvalues * state + drive
        states.append(state)
    return torch.stack(states, 1)


def mixer_loop(mixer: LRUMixer, u: torch.Tensor) -> torch.Tensor:
    """y = Re(C h) + D u by the textbook, in the dtype of the layer."""
    eigenvalues = torch.exp(torch.complex(-mixer.nu_log.exp(), mixer.theta_log.exp()))
    B, C = torch.complex(*mixer.B.unbind(-1)), torch.complex(*mixer.C.unbind(-1))
    drive = torch.einsum("nh,blh->bln", mixer.gamma_log.exp().unsqueeze(1) * B, u.to(B.dtype))
    return torch.einsum("hn,bln->blh", C, recurrence_loop(eigenvalues, drive)).real + mixer.D * u


def gradients(outputs: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    weight = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad((outputs * weight.to(outputs)).sum(), inputs))


def random_eigenvalues(count: int) -> torch.Tensor:
    return torch.polar(torch.rand(count, dtype=torch.float64), 2 * math.pi * torch.rand(count, dtype=torch.float64))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 17, 50, 101])
def test_the_recurrence_is_that_of_a_plain_loop_and_leaves_its_inputs_alone(length):
    set_seed(length)
    eigenvalues, inputs = random_eigenvalues(5), torch.randn(3, length, 5, dtype=torch.complex128)
    given = inputs.clone()
    states = linear_recurrence(eigenvalues, inputs)
    assert states.shape == inputs.shape and torch.equal(inputs, given)
    torch.testing.assert_close(states, recurrence_loop(eigenvalues, inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_the_recurrence_has_the_gradients_of_finite_differences(length):
    set_seed(length)
    eigenvalues, inputs = random_eigenvalues(3), torch.randn(2, length, 3, dtype=torch.complex128)
    assert torch.autograd.gradcheck(linear_recurrence, (eigenvalues.requires_grad_(), inputs.requires_grad_()))


def test_an_eigenvalue_of_zero_forgets_everything():
    inputs = torch.randn(2, 10, 2, dtype=torch.complex64)
    states = linear_recurrence(torch.tensor([0j, 1e-30]), inputs)
    torch.testing.assert_close(states, inputs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 3e-5), (torch.float64, 1e-12)])
def test_a_layer_has_the_outputs_and_gradients_of_the_textbook_loop(dtype, error):
    mixer = build_lru().model.layers[1].mixer.to(dtype)
    u = torch.randn(2, 19, 12, dtype=dtype, requires_grad=True)
    outputs, expected = mixer(u), mixer_loop(mixer, u)
    assert outputs.dtype == dtype
    torch.testing.assert_close(outputs, expected, rtol=error, atol=error)
    wanted = (u, *mixer.parameters())
    for actual, reference in zip(gradients(outputs, *wanted), gradients(expected, *wanted), strict=True):
        torch.testing.assert_close(actual, reference, rtol=error, atol=error * reference.abs().max().item())


def test_a_float64_model_computes_in_float64(blocks):
    model = build_lru().double().eval()
    logits = model(input_ids=blocks[:2]).logits
    mixers = [layer.mixer for layer in model.model.layers]
    for mixer in mixers:
        mixer.forward = lambda u, mixer=mixer: mixer_loop(mixer, u)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, model(input_ids=blocks[:2]).logits, rtol=0, atol=1e-12)


def test_autocast_leaves_the_recurrence_in_float32(blocks, monkeypatch):
    model, dtypes = build_lru(), []

    def recording(eigenvalues, inputs):
        dtypes.append((eigenvalues.dtype, inputs.dtype))
        return linear_recurrence(eigenvalues, inputs)

    monkeypatch.setattr(modeling_lru, "linear_recurrence", recording)
    mixer, u = model.model.layers[0].mixer, torch.randn(2, 19, 12)
    plain = mixer(u)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixer(u), plain)
        assert mixer(u.bfloat16()).dtype == torch.bfloat16
        loss = model(input_ids=blocks[:2], labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert set(dtypes) == {(torch.complex64, torch.complex64)}
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("channels", [None, 3])
def test_padding_changes_nothing(blocks, side, channels):
    """With a mask, whatever stands in the padding."""
    model = build_lru(vocab_size=VOCABULARY if channels is None else None, num_channels=channels or 1).eval()
    whole = blocks[:3] if channels is None else torch.randn(3, 32, channels)
    name, lengths = ("input_ids" if channels is None else "input_values"), (5, 32, 17)
    kept = [slice(32 - length, None) if side == "left" else slice(length) for length in lengths]
    mask = torch.zeros(3, 32, dtype=torch.long)
    for row, part in zip(mask, kept, strict=True):
        row[part] = 1
    outputs = model.model(**{name: whole}, attention_mask=mask).last_hidden_state
    logits = model(**{name: whole}, attention_mask=mask).logits
    for i, part in enumerate(kept):
        alone = {name: whole[i : i + 1, part]}
        torch.testing.assert_close(outputs[i, part], model.model(**alone).last_hidden_state[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(logits[i], model(**alone).logits[0], rtol=0, atol=1e-5)


def test_values_of_one_channel_need_no_axis_for_it_and_may_be_integers():
    model = build_lru(vocab_size=None).eval()
    values = torch.randint(-3, 4, (2, 9))
    logits = model(input_values=values.float().unsqueeze(-1)).logits
    assert logits.shape == (2, 2)
    assert torch.equal(model(input_values=values.float()).logits, logits)
    assert torch.equal(model(input_values=values).logits, logits)


@pytest.mark.parametrize(
    ("vocab_size", "given", "expected"),
    [(512, ["input_values"], "input_ids"), (None, ["input_ids"], "input_values"), (512, [], "input_ids")]
    + [(size, ["input_ids", "input_values"], name) for size, name in ((512, "input_ids"), (None, "input_values"))],
)
def test_the_wrong_input_is_refused(vocab_size, given, expected):
    model = build_lru(vocab_size=vocab_size)
    with pytest.raises(ValueError, match=rf"takes {expected} \(vocab_size = {vocab_size}\), and only them"):
        model(**{name: torch.zeros(1, 4, dtype=torch.long) for name in given})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_size": 0}, "state_size = 0 for 6 layers"),
        ({"state_size": [4, 4], "num_hidden_layers": 3}, r"state_size = \[4, 4\] for 3 layers"),
        ({"state_size": [4, 0], "num_hidden_layers": 2}, r"state_size = \[4, 0\] for 2 layers"),
        ({"num_hidden_layers": 0}, "for 0 layers"),
        ({"r_min": -0.1}, r"r_min = -0\.1"),
        ({"r_min": 0.9, "r_max": 0.9}, r"r_min = 0\.9, r_max = 0\.9"),
        ({"r_max": 1.0}, r"r_max = 1\.0; allowed: 0 ≤ r_min < r_max < 1"),
    ],
)
def test_sizes_and_rings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LRUConfig(**options)


def test_every_layer_has_the_size_that_the_configuration_gives_it():
    assert LRUConfig(state_size=7, num_hidden_layers=3).state_sizes == [7, 7, 7]
    model = build_lru(state_size=[5, 9])
    for layer, size in zip(model.model.layers, (5, 9), strict=True):
        shapes = {name: tuple(parameter.shape) for name, parameter in layer.mixer.named_parameters()}
        assert shapes == {name: (size,) for name in ("nu_log", "theta_log", "gamma_log")} | {
            "B": (size, 12, 2),
            "C": (12, size, 2),
            "D": (12,),
        }


def test_the_initial_eigenvalues_fill_their_ring_and_the_inputs_are_normalised():
    set_seed(0)
    options = dict(state_size=2000, num_hidden_layers=1, hidden_size=24, r_min=0.4, r_max=0.8, max_phase=1.0)
    mixer = LRUModel(LRUConfig(**options)).layers[0].mixer
    with torch.no_grad():
        eigenvalues, B, C = mixer.system()
    squared, phase = eigenvalues.abs().square(), eigenvalues.angle()
    assert 0.4 <= eigenvalues.abs().min() < 0.41 and 0.79 < eigenvalues.abs().max() <= 0.8
    assert 0 <= phase.min() < 0.01 and 0.99 < phase.max() <= 1.0
    assert squared.mean() == pytest.approx((0.16 + 0.64) / 2, abs=0.02)  # uniform on the ring's area
    assert phase.mean() == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(mixer.gamma_log.detach().double().exp(), (1 - squared).sqrt(), rtol=1e-5, atol=0)
    assert (B.abs().square().sum(1) / (1 - squared)).mean() == pytest.approx(1, abs=0.05)
    assert C.abs().square().sum(1).mean() == pytest.approx(2, abs=0.1)
    assert 0.5 < mixer.D.detach().std() < 1.5


def test_a_model_of_ragged_sizes_survives_a_round_trip_through_auto_classes(tmp_path, blocks):
    model = build_lru(state_size=[5, 9], num_labels=3).eval()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is LRUConfig and config.state_size == [5, 9] and config.num_labels == 3
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is LRUForSequenceClassification
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.equal(loaded(input_ids=blocks[:3]).logits, model(input_ids=blocks[:3]).logits)

    base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(base) is LRUModel and not info["missing_keys"] and not info["mismatched_keys"]
    assert_identical(weights_of(base), weights_of(model.model))


def test_activation_checkpointing_runs_the_layers_twice_and_changes_no_gradient(blocks):
    def train(checkpointing: bool):
        model, calls = build_lru(hidden_dropout_prob=0.3).train(), []
        if checkpointing:
            model.activation_checkpointing_enable()
        for layer in model.model.layers:
            layer.mixer.register_forward_hook(lambda *args: calls.append(1))
        set_seed(1)
        model(input_ids=blocks[:4], labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}, len(calls)

    (plain, calls), (checkpointed, repeated) = train(False), train(True)
    assert repeated == 2 * calls
    assert_identical(plain, checkpointed)


def test_the_parameters_of_a_system_are_the_inverse_of_the_system_of_a_layer():
    set_seed(0)
    mixer, u = build_lru().model.layers[0].mixer.double(), torch.randn(2, 19, 12, dtype=torch.float64)
    expected = mixer(u)
    parameters = LRUMixer.parameters_of(*(tensor.detach() for tensor in mixer.system()))
    assert parameters.keys() == {"nu_log", "theta_log", "gamma_log", "B", "C"}
    mixer.load_state_dict(parameters | {"D": mixer.D})
    torch.testing.assert_close(mixer(u), expected, rtol=0, atol=1e-12)


def test_parameters_of_a_system_are_finite_and_normalised_for_any_stable_eigenvalue():
    """Zero, real, of negative phase, repeated, a hair inside the circle; and states without inputs or outputs."""
    mixer = build_lru(state_size=9).model.layers[0].mixer.double()
    eigenvalues = torch.tensor([0, 0.5, -0.5, -0.9j, -0.9j, 1 - 1e-9, 0.3 - 1e-18j, 0.7j, 0.6], dtype=torch.complex128)
    B, C = torch.randn(9, 12, dtype=torch.complex128), torch.randn(12, 9, dtype=torch.complex128)
    B[7], C[:, 8] = 0, 0
    parameters = LRUMixer.parameters_of(eigenvalues, B, C)
    assert all(torch.isfinite(tensor).all() for tensor in parameters.values())
    mixer.load_state_dict(parameters | {"D": mixer.D})
    with torch.no_grad():
        actual, inputs, outputs = mixer.system()
        norms = mixer.B.square().sum((1, 2))
    torch.testing.assert_close(actual, eigenvalues, rtol=0, atol=1e-9)
    torch.testing.assert_close(mixer.gamma_log.detach().exp(), (1 - eigenvalues.abs().square()).sqrt())
    torch.testing.assert_close(norms, (B.abs().amax(1) > 0).double())
    residues = torch.einsum("hn,nk->nhk", outputs, inputs)
    torch.testing.assert_close(residues, torch.einsum("hn,nk->nhk", C, B), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_the_loss_is_cross_entropy_for_classes_and_a_squared_error_for_a_number(blocks, num_labels):
    model = build_lru(num_labels=num_labels).eval()
    labels = torch.randn(4) if num_labels == 1 else torch.tensor([0, 2, 1, 2])
    output = model(input_ids=blocks[:4], labels=labels)
    if num_labels == 1:
        expected = (output.logits[:, 0] - labels).square().mean()
    else:
        expected = -output.logits.log_softmax(-1)[torch.arange(4), labels].mean()
    torch.testing.assert_close(output.loss, expected)
    assert model(input_ids=blocks[:4]).loss is None


@pytest.mark.parametrize("num_labels", [2, 1])
def test_accumulated_gradients_train_as_one_large_batch_does(tmp_path, blocks, num_labels):
    labels = label_of(blocks) if num_labels == 2 else label_of(blocks).float()
    dataset = Dataset.from_dict({"input_ids": blocks[:72].tolist(), "labels": labels[:72].tolist()})
    runs = []
    for batch_size, accumulation in ((24, 1), (8, 3)):
        options = dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=3)
        model = build_lru(num_labels=num_labels, hidden_dropout_prob=0.0)
        runs.append(build_trainer(tmp_path, dataset, model=model, **options))
        runs[-1].train()
    assert losses_of(runs[0]) == pytest.approx(losses_of(runs[1]), abs=1e-4)
    torch.testing.assert_close(*(weights_of(run.model) for run in runs), rtol=0, atol=1e-4)


def test_whole_numbers_are_numbers_too():
    config = LRUConfig(r_min=0, hidden_dropout_prob=0, max_phase=3)
    assert (config.r_min, config.hidden_dropout_prob, config.max_phase) == (0, 0, 3)


def test_the_model_names_its_input_and_its_embedding():
    tokens, values = build_lru(), LRUForSequenceClassification(LRUConfig(state_size=4, hidden_size=8, num_labels=2))
    assert (tokens.main_input_name, values.main_input_name) == ("input_ids", "input_values")
    tokens.resize_token_embeddings(600)
    assert tokens(input_ids=torch.tensor([[599]])).logits.shape == (1, 2)
    with pytest.raises(ValueError, match=r"input_values of shape \(2, 0\): a sequence needs at least one position"):
        values(input_values=torch.zeros(2, 0))
