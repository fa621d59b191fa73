"""A cut model comes back through plain `from_pretrained`, in a process that has transformers and nothing of ours."""

import textwrap

import pytest
import torch
from conftest import build_trainer
from processes import run_program
from safetensors.torch import load_file, save_file
from trainer_callbacks import cutting_callback

STOCK = """
    import sys
    sys.modules["hf_compressm"] = None  # importing it would fail
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, MambaForCausalLM

    folder = sys.argv[1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is MambaForCausalLM and model.config.state_size == 4
    ids = load_file(folder + "/ids.safetensors")["ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    cached = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True)
    uncached = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
    assert cached.shape[1] == ids.shape[1] + 12 and torch.equal(cached, uncached)
    save_file({"logits": logits, "generated": cached}, folder + "/result.safetensors")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory, dataset, blocks):
    """(folder, model, ids) of a run that cut twice."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = build_trainer(folder, dataset, [cutting_callback()], max_steps=60)
    trainer.train()
    trainer.save_model()
    ids = blocks[:3, :11].clone()
    save_file({"ids": ids}, folder / "ids.safetensors")
    return folder, trainer.model.eval(), ids


def test_it_loads_and_generates_with_transformers_alone(saved):
    folder, model, ids = saved
    run_program(textwrap.dedent(STOCK), folder)
    result = load_file(folder / "result.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(result["logits"], model(input_ids=ids).logits, rtol=0, atol=1e-5)
    generated = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(result["generated"], generated)


def test_beam_search_and_left_padding_work_on_the_cut_model(saved):
    _, model, ids = saved
    beams = model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False)
    assert beams.shape == (3, 16)
    padded = torch.cat([torch.zeros(3, 2, dtype=ids.dtype), ids], dim=1)
    mask = torch.cat([torch.zeros(3, 2, dtype=ids.dtype), torch.ones_like(ids)], dim=1)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(
            model(input_ids=padded, attention_mask=mask).logits[:, 2:], expected, rtol=0, atol=1e-4
        )
