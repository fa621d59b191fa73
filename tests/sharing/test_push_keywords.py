"""Every keyword of a push is one that it names: none is passed over in silence."""

import inspect

import pytest
from conftest import build_model

from hf_compressm.sharing.hub import push_compressed, push_folder
from hf_compressm.storage.history import History


def test_a_model_and_a_folder_are_pushed_with_the_same_keywords():
    of_model, of_folder = (inspect.signature(push).parameters for push in (push_compressed, push_folder))
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in of_model.values())
    names = of_folder.keys() - {"folder"}
    assert names | {"model", "history", "tokenizer"} == of_model.keys()
    assert {name: of_model[name].default for name in names} == {name: of_folder[name].default for name in names}


def test_a_keyword_that_does_not_exist_is_refused_before_the_hub_is_asked(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TypeError, match="branch"):
        push_compressed(build_model(), "tester/model", History({}), branch="small")
