"""The scan inside a Mamba: it gives what Transformers' own loop gives, and comes and goes without a trace."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from scan_reference import reference_scan, relative_error, scan_inputs, small_model, token_ids
from torch.library import opcheck
from transformers.models.mamba import modeling_mamba

from hf_compressm import install_scan, uninstall_scan
from hf_compressm.architectures.installed_scan import observed_scan, scan_installed, scan_is_installed
from hf_compressm.kernels import cpp_scan
from hf_compressm.kernels.scan import sampled_scan

ORIGINALS = {
    name: getattr(modeling_mamba, name)
    for name in (
        "mamba_selective_scan",
        "mamba_inner_fn",
        "mamba_selective_state_update",
        "causal_conv1d_fn",
        "causal_conv1d_update",
    )
}


@pytest.fixture(autouse=True)
def uninstalled_scan():
    """Against conftest, which installs it: here each test says itself when the scan is installed."""
    uninstall_scan()
    yield
    uninstall_scan()


@pytest.fixture(params=["torch", "cpp", "triton"])
def implementation(request):
    return request.param


def padding_mask(side, lengths=(21, 13, 1), length=21):
    positions = torch.arange(length) if side == "right" else torch.arange(length).flip(0)
    return (positions < torch.tensor(lengths)[:, None]).long()


def logits_and_gradients(model, mask=None, autocast=False):
    ids = token_ids()
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        output = model(ids, attention_mask=mask, labels=labels, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("mode", "options", "tolerance"),
    [
        ("train", {}, 1e-5),
        ("eval", {}, 1e-5),
        ("train", {"mask": padding_mask("left")}, 1e-5),
        ("train", {"mask": padding_mask("right")}, 1e-5),
        ("eval", {"mask": padding_mask("left")}, 1e-5),
        ("eval", {"mask": padding_mask("right")}, 1e-5),
        ("activation checkpointing", {}, 1e-5),
        ("train", {"autocast": True}, 1e-1),
    ],
    ids=["train", "eval", "left-pad", "right-pad", "eval-left-pad", "eval-right-pad", "checkpointing", "autocast"],
)
def test_a_model_gives_the_logits_and_gradients_of_transformers_own_loop(mode, options, tolerance):
    model = small_model().train(mode != "eval")
    if mode == "activation checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
    expected_logits, expected_gradients = logits_and_gradients(model, **options)
    install_scan()
    logits, gradients = logits_and_gradients(model, **options)
    assert relative_error(logits, expected_logits) < tolerance
    for name, expected in expected_gradients.items():
        assert relative_error(gradients[name], expected) < tolerance, name


@torch.no_grad()
def test_prefill_and_decoding_equal_the_full_forward():
    model, ids = small_model().eval(), token_ids()
    install_scan()
    full = model(ids, use_cache=False).logits
    prefill = model(ids[:, :9], use_cache=True)
    logits = [prefill.logits]
    cache = "cache" if "cache" in prefill else "cache_params"  # as Transformers calls it from 5.24 on, and before
    for t in range(9, ids.shape[1]):
        step = model(ids[:, t : t + 1], **{cache: prefill[cache]}, use_cache=True)
        logits.append(step.logits)
    assert relative_error(torch.cat(logits, 1), full) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_size", [1, 3, 12, 16, 31, 128])
@pytest.mark.parametrize("options", [(), ("D", "gate", "time_step_bias")], ids=["bare", "all-options"])
def test_a_step_of_generation_equals_the_recurrence(state_size, options, dtype):
    inputs = scan_inputs(3, 7, state_size, 1, options=(*options, "initial_state"))
    inputs = {name: v.to(dtype).double() if torch.is_tensor(v) else v for name, v in inputs.items()}
    expected, expected_state = reference_scan(**inputs)
    state = inputs.pop("initial_state").float()
    softplus = inputs.pop("softplus")
    narrow = {name: v.to(dtype).squeeze(-1) if v.ndim == 3 else v.float() for name, v in inputs.items()}
    renamed = {"u": "hidden_states", "time_step": "dt", "gate": "z", "time_step_bias": "dt_bias"}
    arguments = {renamed.get(name, name): value for name, value in narrow.items()}
    install_scan()
    y = modeling_mamba.mamba_selective_state_update(state, dt_softplus=softplus, **arguments)
    assert y.dtype == dtype and y.shape == (3, 7)
    assert relative_error(state, expected_state) < 1e-6
    assert relative_error(y, expected[..., 0]) < (1e-6 if dtype == torch.float32 else 2**-8)


def test_a_step_keeps_what_an_operator_promises_and_leaves_gradients_to_pytorch():
    inputs = scan_inputs(2, 5, 9, 1, torch.float32, ())
    u, time_step, A, B, C = (inputs[name].squeeze(-1) for name in ("u", "time_step", "A", "B", "C"))
    state = torch.randn(2, 5, 9)
    assert cpp_scan.is_available()
    opcheck(torch.ops.hf_compressm_kernel.step, (state, u, time_step, A, B, C, None, None, None, True))
    install_scan()
    y = modeling_mamba.mamba_selective_state_update(state, u.requires_grad_(), time_step, A, B, C)
    assert torch.autograd.grad(y.sum(), u)[0].abs().sum() > 0


def test_installing_is_idempotent_and_uninstalling_restores_the_function_objects():
    before = dict(vars(modeling_mamba))
    install_scan()
    installed = dict(vars(modeling_mamba))
    assert scan_is_installed()
    assert {name for name in installed if installed[name] is not before[name]} == set(ORIGINALS)
    install_scan()
    assert all(getattr(modeling_mamba, name) is installed[name] for name in ORIGINALS)
    for _ in range(2):
        uninstall_scan()
        assert not scan_is_installed()
        assert all(getattr(modeling_mamba, name) is original for name, original in ORIGINALS.items())


@pytest.mark.parametrize("installed_before", [False, True])
def test_scan_installed_leaves_things_as_before_even_after_an_error(installed_before):
    if installed_before:
        install_scan()
    before = modeling_mamba.mamba_selective_scan
    with pytest.raises(KeyError), scan_installed():
        assert scan_is_installed()
        raise KeyError
    assert scan_is_installed() == installed_before
    assert modeling_mamba.mamba_selective_scan is before


@pytest.mark.parametrize("installed_before", [False, True])
@torch.no_grad()
def test_an_observer_sees_each_layers_scan_once_at_the_ends_of_its_chunks(installed_before):
    if installed_before:
        install_scan()
    model, ids = small_model().eval(), token_ids()
    mixers = [block.mixer for block in model.backbone.layers]
    expected, seen = [], []

    def gate_of(mixer, args, projected):
        expected.append({"gate": projected.transpose(1, 2).chunk(2, dim=1)[1]})

    def scan_of(mixer):
        def hook(module, args, output):
            step, B, C = output.mT.split([mixer.time_step_rank, 7, 7], dim=1)
            step = torch.log1p(torch.exp(mixer.dt_proj.weight @ step + mixer.dt_proj.bias[:, None]))
            expected[-1] |= {"u": args[0].mT, "time_step": step, "A": -mixer.A_log.exp(), "B": B, "C": C}

        return hook

    for mixer in mixers:
        mixer.in_proj.register_forward_hook(gate_of)
        mixer.x_proj.register_forward_hook(scan_of(mixer))

    def observer(*arguments):
        y, last_state, positions, sample = sampled_scan(*arguments)
        seen.append((positions, sample))
        return y, last_state

    with observed_scan(observer):
        assert scan_is_installed()
        logits = model(ids).logits
    assert scan_is_installed() == installed_before
    assert relative_error(model(ids).logits, logits) < 1e-5  # no longer observed

    assert len(seen) == len(mixers) == 2
    for (positions, sample), layer in zip(seen, expected, strict=False):
        assert positions.tolist() == [15, 20] and sample["states"].shape == (3, 2, 7, 64)
        for name, value in layer.items():
            at_ends = value if name == "A" else value[..., positions]
            torch.testing.assert_close(sample[name], at_ends, rtol=1e-5, atol=1e-6, msg=name)
        for i, end in enumerate(positions):
            part = {name: value if name == "A" else value[..., : end + 1] for name, value in layer.items()}
            assert relative_error(sample["states"][:, i].mT, reference_scan(**part)[1]) < 1e-5


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32])
def test_a_sample_has_the_state_after_each_of_its_positions(length):
    inputs = scan_inputs(length=length, options=("gate",))
    y, last_state, positions, sample = sampled_scan(**inputs)
    assert positions.tolist() == [*range(15, length, 16)] + [length - 1] * (length % 16 > 0)
    assert torch.equal(sample["states"][:, -1].mT, last_state) and torch.equal(
        sample["gate"], inputs["gate"][..., positions]
    )
    assert relative_error(y, reference_scan(**inputs)[0]) < 1e-12


CUDA_ONLY_PACKAGES = {
    "mamba_ssm/__init__.py": """
def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False):
    raise RuntimeError("CUDA only")

def mamba_inner_fn(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias,
                   A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None,
                   delta_softplus=True):
    raise RuntimeError("CUDA only")
""",
    "mamba_ssm/ops/__init__.py": "",
    "mamba_ssm/ops/triton/__init__.py": "",
    "mamba_ssm/ops/triton/selective_state_update.py": """
def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    raise RuntimeError("CUDA only")
""",
    "causal_conv1d/__init__.py": """
def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
    raise RuntimeError("CUDA only")

def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None):
    raise RuntimeError("CUDA only")
""",
}
CPU_MODEL_BESIDE_CUDA_KERNELS = """
import torch
from torch.library import opcheck
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba
from hf_compressm import install_scan
from hf_compressm.architectures.installed_scan import reference_would_run, scan_in_force

def refused(function, *arguments):
    try:
        function(*arguments)
    except RuntimeError as error:
        return "CUDA only" in str(error)
    return False

required = {"mamba_selective_scan": 5, "mamba_inner_fn": 8, "mamba_selective_state_update": 6,
            "causal_conv1d_fn": 2, "causal_conv1d_update": 3}
for name, count in required.items():
    assert refused(getattr(modeling_mamba, name), *[torch.ones(1, 1, 1)] * count), name

torch.manual_seed(0)
model = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=7))
ids = torch.randint(61, (3, 11))
assert refused(model.train(), ids) and refused(model.eval(), ids)

assert not reference_would_run("cuda") and reference_would_run("cpu")
assert scan_in_force("cuda").startswith("mamba_ssm")
install_scan()
assert scan_in_force("cuda").startswith("mamba_ssm") and scan_in_force("cpu") == "cpp"
model.train()(ids, labels=ids).loss.backward()
assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
model.eval()
with torch.no_grad():
    generated = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True, eos_token_id=None)
    assert generated.shape == (3, 16)
    logits = model(generated, use_cache=False).logits
assert torch.equal(logits[:, 10:-1].argmax(-1), generated[:, 11:])
print("works")
"""


def test_a_cuda_only_mamba_ssm_does_not_break_a_cpu_model(tmp_path):
    for path, source in CUDA_ONLY_PACKAGES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
    search_path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-c", CPU_MODEL_BESIDE_CUDA_KERNELS],
        env=os.environ | {"PYTHONPATH": search_path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and run.stdout.endswith("works\n"), run.stderr
