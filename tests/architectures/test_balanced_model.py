"""A balanced model is the stock one until it projects; then its state is exactly the projected one."""

import copy
import pickle

import pytest
import torch
import transformers
from accelerate import cpu_offload, dispatch_model
from balanced_models import (
    CASES,
    GROUPS,
    N,
    balanced,
    build,
    build_cut,
    build_stock,
    cache_for,
    config_of,
    cut,
    exact_scans,
    mixers_of,
    module_of,
    new,
    states_of,
    tokens,
)
from conftest import weights_of
from transformers import set_seed

from hf_compressm.architectures.scalar_decay.balanced import (
    BALANCED_CLASSES,
    balance_modules,
)
from hf_compressm.surgery.basis import in_basis

every_case = pytest.mark.parametrize("case", CASES)


def gradients_of(model, ids) -> dict[str, torch.Tensor | None]:
    """Gradients of one training step, by name."""
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@every_case
@pytest.mark.parametrize("origin", [build, build_stock], ids=["built", "loaded"])
def test_what_projects_nothing_is_the_stock_model_bit_for_bit(case, origin):
    model, ids = origin(case=case), tokens()
    same = balanced(model)
    projections = {name for name, _ in same.named_parameters() if name.endswith(("B_proj", "C_proj"))}
    assert len(projections) == 2 * len(mixers_of(same)) and type(same) is BALANCED_CLASSES[type(model)]
    assert all(torch.equal(mixer.C_proj, torch.eye(N).expand(GROUPS, N, N)) for mixer in mixers_of(same))
    with torch.no_grad():
        assert torch.equal(same(input_ids=ids).logits, model(input_ids=ids).logits)
    expected, given = gradients_of(model.train(), ids), gradients_of(same.train(), ids)
    assert all(given.pop(name) is None for name in projections)
    assert given.keys() == expected.keys()
    assert all(given[name] is value or torch.equal(given[name], value) for name, value in expected.items())


@every_case
def test_a_new_model_has_the_weights_of_a_new_stock_one(case):
    """No random number more is drawn; projections of N rows are identities, and used; Δ is clamped likewise."""
    clamped = {"time_step_min": 0.05} if case in ("nemotron_h", "zamba2") else {"time_step_limit": (0.5, 0.9)}
    model, ids = new(case, **clamped), tokens()
    config = BALANCED_CLASSES[type(model.config)].from_dict(model.config.to_dict() | {"balanced_state_size": N})
    set_seed(0)
    built = BALANCED_CLASSES[type(model)](config).eval()
    weights = weights_of(built)
    assert all(torch.equal(weights[name], value) for name, value in weights_of(model).items())
    assert all(mixer.reduced_state_size == N for mixer in mixers_of(built))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(built(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
        for mixer in mixers_of(built):
            mixer.time_step_limit = (0.0, float("inf"))
        assert not torch.allclose(built(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


@every_case
def test_the_state_is_the_projected_one_at_every_token(case):
    """H̃_t = H_t Wᵀ, through two cuts, in every layer; the logits are those of C ← WᵀV C. In float64."""
    model, ids = build_stock(case=case).double(), tokens()
    model.set_experts_implementation("eager")  # the grouped product knows no float64
    count = len(mixers_of(model))
    once = cut(balanced(model), [6] * count)
    twice = cut(copy.deepcopy(once), [3] * count, seed=1)
    B_proj, C_proj = ([getattr(mixer, name) for mixer in mixers_of(twice)] for name in ("B_proj", "C_proj"))

    def read(layer, C):
        return torch.einsum("grn,grm,blgm->blgn", B_proj[layer], C_proj[layer], C)

    caches = cache_for(model), cache_for(twice)
    with torch.no_grad():
        for t in range(ids.shape[1]):
            with exact_scans(model, read):
                expected = model(input_ids=ids[:, t : t + 1], **caches[0]).logits
            with exact_scans(twice):
                given = twice(input_ids=ids[:, t : t + 1], **caches[1]).logits
            torch.testing.assert_close(given, expected, rtol=0, atol=1e-10)
            for H, H_small, W in zip(states_of(caches[0], model), states_of(caches[1], twice), B_proj, strict=True):
                assert H_small.shape[-1] == 3
                W = W.repeat_interleave(H.shape[1] // GROUPS, 0)
                error = H_small - torch.einsum("bhpn,hrn->bhpr", H, W)
                assert error.abs().max() < 1e-12 * H.abs().max()
        with exact_scans(model, read):
            expected = model(input_ids=ids).logits
        with exact_scans(twice):
            torch.testing.assert_close(twice(input_ids=ids).logits, expected, rtol=0, atol=1e-10)
    first_states = []
    for each in (once, twice):  # layer 0 has the same inputs in both
        cache = cache_for(each)
        with exact_scans(each), torch.no_grad():
            each(input_ids=ids, **cache)
        first_states.append(states_of(cache, each)[0])
    solved = torch.linalg.lstsq(mixers_of(once)[0].B_proj.mT, mixers_of(twice)[0].B_proj.mT).solution  # W2ᵀ
    expected = torch.einsum("bhpn,hnr->bhpr", first_states[0], solved.repeat_interleave(2, 0))
    torch.testing.assert_close(first_states[1], expected, rtol=0, atol=1e-12)


@every_case
def test_training_moves_the_projections_and_takes_no_fused_kernel_that_cannot_project(case, monkeypatch):
    model, ids, fused = build_cut(case).train(), tokens(), []
    mixers = mixers_of(model)
    kernel = "mamba2_split_conv1d_scan_combined"
    monkeypatch.setattr(module_of(mixers[0]), kernel, lambda *_, **__: fused.append(kernel))
    gradients_of(model, ids)
    assert not fused and all(mixer.B_proj.grad.any() and mixer.C_proj.grad.any() for mixer in mixers)
    gradients_of(balanced(build_stock(case=case)).train(), ids)
    assert len(fused) == len(mixers)


@every_case
def test_gradient_checkpointing_changes_no_gradient(case):
    model, ids = build_cut(case).train(), tokens()
    expected = gradients_of(model, ids)
    model.activation_checkpointing_enable()
    given = gradients_of(model, ids)
    assert all(value is None or torch.allclose(given[name], value, atol=1e-7) for name, value in expected.items())


@every_case
def test_mixed_precision_and_bf16_weights_cost_no_more_than_in_the_stock_model(case):
    errors = []
    for model in (build_stock(case=case), build_cut(case)):
        with torch.no_grad():
            expected = model(input_ids=tokens()).logits
            half = copy.deepcopy(model).bfloat16()(input_ids=tokens())
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model.train()(input_ids=tokens(), labels=tokens())
        mixed.loss.backward()
        errors.append([(out.logits - expected).square().mean().sqrt() for out in (half, mixed)])
    assert all(mixer.B_proj.grad.isfinite().all() and mixer.B_proj.grad.any() for mixer in mixers_of(model))
    stock, balanced_one = torch.tensor(errors)
    assert (balanced_one > 0).all() and (balanced_one < 2 * stock).all()


slow_but_for_mamba2 = pytest.mark.parametrize(
    "case", [case if case == "mamba2" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)


@slow_but_for_mamba2
def test_a_mixer_is_compiled_as_one_graph(case):
    mixer, inputs = mixers_of(build_cut(case))[0], torch.randn(2, 19, 32, requires_grad=True)
    compiled = torch.compile(mixer, backend="eager", fullgraph=True)
    outputs = mixer(inputs), compiled(inputs)
    torch.testing.assert_close(*outputs)
    wanted = [inputs, mixer.B_proj, mixer.C_proj, mixer.in_proj.weight]
    for pair in zip(*(torch.autograd.grad(output.square().sum(), wanted) for output in outputs), strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.slow
@every_case
def test_a_compiled_model_trains_as_the_model_itself(case):
    model, ids = build_cut(case).train(), tokens()
    expected = gradients_of(model, ids)
    given = gradients_of(torch.compile(model, backend="aot_eager"), ids)
    for name, value in expected.items():
        assert value is None or torch.allclose(given[f"_orig_mod.{name}"], value, rtol=1e-4, atol=1e-6)


def traces_of(model) -> dict:
    """All that tells one model from another, apart from the numbers."""
    return {
        "modules": {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()},
        "shapes": {name: tensor.shape for name, tensor in model.state_dict().items()},
        "config": (type(model.config), model.config.to_dict(), sorted(vars(model.config))),
        "tied": model.all_tied_weights_keys,
        "not split": model._no_split_modules,
    }


@every_case
@pytest.mark.parametrize("origin", [build, build_stock], ids=["built", "loaded"])
def test_there_and_back_leaves_no_trace(case, origin):
    model = origin(case=case)
    before = traces_of(model)
    with in_basis(model, "balanced"):
        for _ in range(2):  # the second time does nothing
            assert all(type(module) not in BALANCED_CLASSES for module in model.modules())
            assert all(mixer.reduced_state_size is None for mixer in mixers_of(model))
            assert model.config.model_type == f"compressm_{before['config'][1]['model_type']}"
            balance_modules(model)
        assert traces_of(model)["tied"] == before["tied"] and traces_of(model)["not split"] == before["not split"]
    assert traces_of(model) == before


@every_case
def test_copies_and_pickles(case):
    model, ids = build_cut(case), tokens()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is type(model) and type(other.config) is type(model.config)
            assert torch.equal(other(input_ids=ids).logits, expected)


def test_some_layers_project_and_others_do_not():
    model, ids = build_cut("bamba", [3, None]), tokens()
    config = type(model.config).from_dict(model.config.to_dict())
    assert config.reduced_state_sizes() == {0: 3, 2: None}  # layer 1 has attention
    built = type(model)(config)
    assert [mixer.B_proj.shape[1] for mixer in mixers_of(built)] == [3, N]
    built.eval().load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(built(input_ids=ids).logits, model(input_ids=ids).logits)
    gradients = gradients_of(built.train(), ids)
    assert gradients["model.layers.0.mamba.B_proj"].any() and gradients["model.layers.2.mamba.B_proj"] is None


IMPOSSIBLE = [0, -1, True, 2.0, "4", [4], [4, 4, 4], [4, N + 1], [4, "4"], {0: 4}]


@pytest.mark.parametrize(("case", "given"), [*((case, N + 1) for case in CASES), *(("bamba", x) for x in IMPOSSIBLE)])
def test_impossible_sizes_are_refused(case, given):
    config = config_of(case)
    fields = config.to_dict() | {"balanced_state_size": given}
    with pytest.raises(ValueError, match=rf"^balanced_state_size = .*from 1 to \w+ = {N}, or a list of [23] of these"):
        BALANCED_CLASSES[type(config)].from_dict(fields)


def test_what_the_stock_config_refuses_is_refused():
    fields = config_of("mamba2").to_dict() | {"num_heads": 5}
    with pytest.raises(Exception, match="must equal num_heads"):
        BALANCED_CLASSES[transformers.Mamba2Config].from_dict(fields)


def test_what_cannot_be_balanced_is_refused_and_left_as_it_was():
    class Own(transformers.BambaForCausalLM):
        pass

    classifier = transformers.Zamba2ForSequenceClassification(config_of("zamba2"))
    hooked = build_stock(case="mamba2")
    dispatch_model(hooked, {"": "cpu"}, force_hooks=True)
    for model, message in (
        (Own(config_of("bamba")), "the model is a Own, expected one of .*BambaForCausalLM"),
        (classifier, "the model is a Zamba2ForSequenceClassification, expected one of .*Zamba2Model"),
        (hooked, "hooks .* hold the `forward` of mixers"),
    ):
        before = traces_of(model)
        with pytest.raises(ValueError, match=message):
            balance_modules(model)
        assert traces_of(model) == before


@every_case
def test_a_balanced_model_computes_with_offloaded_weights(case):
    model, ids = build_cut(case), tokens()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(mixer.B_proj.is_meta and mixer.conv1d.weight.is_meta for mixer in mixers_of(model))
        assert torch.equal(model(input_ids=ids).logits, expected)
