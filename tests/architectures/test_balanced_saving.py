"""A balanced model is saved with the file that it needs, and loads anywhere: with the package, and without it."""

import json
import textwrap

import pytest
import torch
from balanced_models import CASES, N, balanced, build, build_cut, build_stock, cut, mixers_of, tokens
from conftest import assert_identical, weights_of
from hub_fixtures import NAME
from processes import run_program
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_compressm import uninstall_scan
from hf_compressm.architectures.scalar_decay.balanced import BALANCED_CLASSES
from hf_compressm.architectures.scalar_decay.balanced.modeling_compressm_balanced import MODULE

every_case = pytest.mark.parametrize("case", CASES)
CODE = f"{MODULE}.py"

WITHOUT_THE_PACKAGE = """
    import pickle, sys
    sys.modules["hf_compressm"] = None  # importing it would fail
    from pathlib import Path
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    trusted = dict(trust_remote_code=True)
    for folder in map(str, sorted(Path(sys.argv[1]).iterdir())):
        for load in (AutoConfig, AutoModel, AutoModelForCausalLM):
            try:
                load.from_pretrained(folder, trust_remote_code=False)
            except ValueError as error:
                assert "trust_remote_code=True" in str(error), error
            else:
                raise AssertionError("loaded without the code it needs")
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trusted)
        assert not any(info.values()), info
        ids = load_file(folder + "/ids.safetensors")["ids"]
        backbone, info = AutoModel.from_pretrained(folder, output_loading_info=True, **trusted)
        assert not info["missing_keys"] and not info["mismatched_keys"], info
        with torch.no_grad():
            logits, hidden = model(input_ids=ids).logits, backbone(input_ids=ids).last_hidden_state
            torch.testing.assert_close(hidden, model.base_model(input_ids=ids).last_hidden_state, rtol=0, atol=0)
            assert torch.equal(pickle.loads(pickle.dumps(model))(input_ids=ids).logits, logits)
            model.save_pretrained(folder + "/again")  # a copy of a copy is whole, too
            again = AutoModelForCausalLM.from_pretrained(folder + "/again", **trusted)
            assert torch.equal(again(input_ids=ids).logits, logits)
        new = model.generate(ids[:, :7], attention_mask=torch.ones_like(ids[:, :7]), max_new_tokens=5, do_sample=False)
        kernels = {name: getattr(model.config, f"_{name}_implementation") for name in ("attn", "experts")}
        save_file({"logits": logits, "new": new}, folder + "/result.safetensors", kernels)
"""


@every_case
def test_it_loads_with_the_package_and_no_flag(case, tmp_path):
    sizes = [3, None, N][: len(mixers_of(build_stock(case=case)))]
    model, ids = build_cut(case, sizes), tokens()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == f"compressm_{case.removesuffix('_norm')}"
    assert config["architectures"] == [type(model).__name__] and config["balanced_state_size"] == sizes
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and type(loaded) is type(model) and type(loaded.config) is type(model.config)
    assert [mixer.reduced_state_size for mixer in mixers_of(loaded)] == sizes
    assert_identical(weights_of(loaded), weights_of(model))
    assert type(AutoModel.from_pretrained(tmp_path)) is type(model.base_model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_it_loads_without_the_package_but_never_without_consent(tmp_path):
    """One process for all families; it runs Transformers' own scan, as this one does then."""
    uninstall_scan()
    models = {case: build_cut(case) for case in CASES}
    for case, model in models.items():
        model.save_pretrained(tmp_path / case)
        save_file({"ids": tokens()}, tmp_path / case / "ids.safetensors")
    run_program(textwrap.dedent(WITHOUT_THE_PACKAGE), tmp_path, HF_MODULES_CACHE=str(tmp_path.parent / "modules"))
    for case, model in models.items():
        result, prompt = load_file(tmp_path / case / "result.safetensors"), tokens()[:, :7]
        with torch.no_grad():
            torch.testing.assert_close(result["logits"], model(input_ids=tokens()).logits, rtol=0, atol=1e-6)
        with safe_open(tmp_path / case / "result.safetensors", "pt") as file:
            stock = build_stock(case=case).config
            assert file.metadata() == {
                "attn": stock._attn_implementation,
                "experts": stock._experts_implementation,
            }
        options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(result["new"], model.generate(prompt, **options))


@every_case
@pytest.mark.parametrize("origin", [build, build_stock], ids=["built", "loaded"])
def test_files_name_the_weights_as_the_stock_models_do(case, origin, tmp_path):
    """Transformers renames weights of some models when it saves and loads them; the type that it goes by is ours."""
    stock = origin(case=case)
    stock.save_pretrained(tmp_path / "stock")
    model = cut(balanced(stock), [3] * len(mixers_of(stock)))
    model.save_pretrained(tmp_path / "balanced")
    expected, given = (load_file(tmp_path / each / "model.safetensors") for each in ("stock", "balanced"))
    own = {name for name in given if name.endswith(("B_proj", "C_proj"))}
    assert len(own) == 2 * len(mixers_of(stock))
    assert_identical({name: given[name] for name in given.keys() - own}, expected)
    assert_identical(weights_of(type(model).from_pretrained(tmp_path / "balanced")), weights_of(model))


@every_case
def test_a_stock_checkpoint_fills_a_balanced_model_whose_projections_start_as_identities(case, tmp_path):
    stock, ids = build_stock(case=case), tokens()
    stock.save_pretrained(tmp_path)
    kind = BALANCED_CLASSES[type(stock)]
    fields = {name: value for name, value in stock.config.to_dict().items() if name != "model_type"}
    config = kind.config_class(**fields, balanced_state_size=3)
    model, info = kind.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert all(key.endswith(("B_proj", "C_proj")) for key in info["missing_keys"])
    assert all(torch.equal(mixer.B_proj[1], torch.eye(3, N)) for mixer in mixers_of(model))
    weights = weights_of(model)
    assert all(torch.equal(weights[name], value) for name, value in weights_of(stock).items())
    config.balanced_state_size = None
    with torch.no_grad():
        same = kind.from_pretrained(tmp_path, config=config)
        assert torch.equal(same(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_a_push_takes_the_code_with_it(hub, tmp_path):
    model = build_cut("mamba2")
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=NAME)
    assert {CODE, "config.json", "model.safetensors"} <= set(hub.files(NAME))
