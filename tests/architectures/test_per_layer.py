"""A Mamba whose layers have sizes of their own: it trains, resumes, goes back, and loads anywhere."""

import json
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import assert_identical, build_model, build_trainer, losses_of, train_steps, weights_of
from processes import run_program
from safetensors.torch import load_file, save_file
from trainer_callbacks import WorseAt
from transformers import AutoModel, AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from hf_compressm import (
    CompreSSMCallback,
    CompreSSMConfig,
    CompreSSMSchedule,
    analyze,
    compress,
    install_scan,
    parameter_groups,
)
from hf_compressm.architectures import state_sizes
from hf_compressm.architectures.selective.per_layer import (
    CompreSSMMambaConfig,
    CompreSSMMambaForCausalLM,
    CompreSSMMambaModel,
)
from hf_compressm.storage.checkpoint import check_checkpoint
from hf_compressm.surgery.shrink_and_grow import pad_state, shrink_state
from hf_compressm.theory.plan import Selection

RAGGED = CompreSSMConfig(cut_fraction=0.5, allocation="per_layer", skip_layers=[1], calibration_batches=4)
TWO_CUTS = CompreSSMSchedule(end=0.5, events=2)

STOCK = """
    import pickle, sys
    sys.modules["hf_compressm"] = None  # importing it would fail
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    folder, trusted = sys.argv[1], dict(trust_remote_code=True)
    for load in (AutoConfig, AutoModel, AutoModelForCausalLM):
        try:
            load.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError("loaded without the code it needs")
    assert [c.state_size for c in AutoConfig.from_pretrained(folder, **trusted).per_layer_config] == [4, 16]
    half = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.bfloat16, **trusted)
    assert half.dtype is torch.bfloat16 
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", **trusted)
    backbone, info = AutoModel.from_pretrained(folder, output_loading_info=True, **trusted)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    ids = load_file(folder + "/ids.safetensors")["ids"]
    with torch.no_grad():
        logits, hidden = model(input_ids=ids).logits, backbone(input_ids=ids).last_hidden_state
    assert torch.equal(hidden @ backbone.embeddings.weight.T, logits)
    assert type(pickle.loads(pickle.dumps(half))) is type(half)  # of the class as it is loaded first
    model.save_pretrained(folder + "/again")  # a copy of a copy is whole, too
    again = AutoModelForCausalLM.from_pretrained(folder + "/again", **trusted)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, logits)
    save_file({"logits": logits, "half": half(input_ids=ids).logits.detach()}, folder + "/result.safetensors")
"""


def build_ragged(sizes=(4, 9)) -> CompreSSMMambaForCausalLM:
    model = build_model()
    shrink_state(model, {i: Selection(torch.arange(size)) for i, size in enumerate(sizes)})
    return model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset):
    """A trainer that cut only layer 0, twice, saving as it went."""
    install_scan()
    folder = tmp_path_factory.mktemp("per_layer")
    options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 6}
    trainer = build_trainer(folder, dataset, [CompreSSMCallback(RAGGED, TWO_CUTS)], **options)
    trainer.train()
    trainer.save_model()
    return trainer


def test_training_makes_it_and_its_checkpoints_say_so(run):
    folder = run.args.output_dir
    assert type(run.model) is CompreSSMMambaForCausalLM and type(run.model.backbone) is CompreSSMMambaModel
    assert state_sizes(run.model) == {0: 4, 1: 16}
    assert check_checkpoint(folder) == {0: 4, 1: 16} and check_checkpoint(f"{folder}/checkpoint-6") == {0: 8, 1: 16}
    config = json.loads(Path(folder, "config.json").read_text())
    assert config["model_type"] == "compressm_mamba" and config["architectures"] == ["CompreSSMMambaForCausalLM"]
    assert config["per_layer_config"] == {"0": {"state_size": 4}} and config["state_size"] == 16


def test_every_tensor_goes_on_learning_after_the_change_of_class(batches):
    model = build_model()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3)
    train_steps(model, optimizer, batches[:2])
    compress(model, analyze(model, batches, RAGGED), optimizer)
    assert type(model) is CompreSSMMambaForCausalLM
    before = weights_of(model)
    train_steps(model, optimizer, batches[:1])
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_it_loads_without_the_package_but_never_without_consent(run, blocks):
    folder, ids = run.args.output_dir, blocks[:3, :11].clone()
    save_file({"ids": ids}, f"{folder}/ids.safetensors")
    run_program(textwrap.dedent(STOCK), folder)
    result = load_file(f"{folder}/result.safetensors")
    with torch.no_grad():
        expected = run.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(result["logits"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(result["half"].float(), expected, rtol=0, atol=0.2)


def test_it_loads_with_the_package_and_no_flag(run):
    folder = run.args.output_dir
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is CompreSSMMambaForCausalLM and type(loaded.config) is CompreSSMMambaConfig
    assert_identical(weights_of(loaded), weights_of(run.model))
    assert type(AutoModel.from_pretrained(folder)) is CompreSSMMambaModel
    assert [block.mixer.config.state_size for block in loaded.backbone.layers] == [4, 16]


def test_a_plain_mamba_stays_a_plain_one(tmp_path):
    build_model().save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is MambaForCausalLM
    assert not (tmp_path / "modeling_compressm_mamba.py").exists()


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_generation_is_the_same_with_a_cache_and_without(blocks, options):
    model, ids = build_ragged(), blocks[:2, :7]
    uncached = {"num_beams": options.get("num_beams", 1), "use_cache": False}
    cached, expected = (model.generate(ids, max_new_tokens=8, do_sample=False, **o) for o in (options, uncached))
    assert cached.shape[1] == 15 and torch.equal(cached, expected)


@pytest.mark.parametrize("step", [6, 12])
def test_a_run_resumes_exactly(run, dataset, tmp_path, step):
    """Before the second cut, and after it."""
    callback = CompreSSMCallback(RAGGED, TWO_CUTS)
    resumed = build_trainer(tmp_path, dataset, [callback], max_steps=20)
    resumed.train(resume_from_checkpoint=f"{run.args.output_dir}/checkpoint-{step}")
    assert losses_of(resumed) == losses_of(run)
    assert_identical(weights_of(resumed.model), weights_of(run.model))


def test_going_back_makes_it_plain_again(dataset, tmp_path):
    callback = CompreSSMCallback(RAGGED, CompreSSMSchedule(end=0.2, events=1, rollback_tolerance=0.05))
    options = {"eval_dataset": dataset.select(range(8)), "eval_strategy": "steps", "eval_steps": 3}
    trainer = build_trainer(tmp_path, dataset, [WorseAt(6), callback], **options)
    trainer.train()
    assert callback.history.events[0].state_sizes_after == [8, 16] and callback.history.rollbacks == 1
    assert type(trainer.model) is MambaForCausalLM and type(trainer.model.config) is MambaConfig
    assert type(trainer.model.backbone) is not CompreSSMMambaModel and trainer.model.config.state_size == 16
    trainer.save_model()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is MambaForCausalLM


def test_padding_makes_it_plain_and_changes_nothing(blocks):
    model, ids = build_ragged(), blocks[:4]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        pad_state(model, 16)
        assert type(model) is MambaForCausalLM and state_sizes(model) == {0: 16, 1: 16}
        assert (model(input_ids=ids).logits - expected).abs().max() < 1e-6


def test_a_reduced_one_can_be_reduced_further(run, batches):
    model = AutoModelForCausalLM.from_pretrained(run.args.output_dir)
    report = analyze(model, batches, CompreSSMConfig(cut_fraction=0.25, calibration_batches=4))
    compress(model, report)
    assert state_sizes(model) == {0: 3, 1: 12}  # each its share: sizes stay its own
    compress(model, analyze(model, batches, CompreSSMConfig(target_state_size=3)))
    assert type(model) is MambaForCausalLM


def test_a_class_of_the_users_own_is_refused(batches):
    class Own(MambaForCausalLM):
        pass

    model = Own(build_model().config)
    with pytest.raises(ValueError, match="layers of a Own would have .*Set allocation='uniform'"):
        analyze(model, batches, RAGGED)
    with pytest.raises(ValueError, match="layers of a Own would have"):
        shrink_state(model, {0: Selection(torch.arange(4)), 1: Selection(torch.arange(9))})
    assert model.config.state_size == 16


def test_more_than_ten_layers(tmp_path):
    """Transformers numbers them with leading zeros then."""
    sizes = [5, 16, 3, *[16] * 8, 7]
    model = build_model(num_hidden_layers=12)
    shrink_state(model, {i: Selection(torch.arange(size)) for i, size in enumerate(sizes)})
    model.save_pretrained(tmp_path)
    assert check_checkpoint(tmp_path) == dict(enumerate(sizes))
    assert list(state_sizes(AutoModelForCausalLM.from_pretrained(tmp_path)).values()) == sizes
