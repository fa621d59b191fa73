"""FSDP2 and DistributedDataParallel beside a torch that was not tested."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_compressm import private_api
from hf_compressm.engines import Engine
from hf_compressm.engines.sharded import check_sharding


@pytest.fixture
def untested_torch(monkeypatch):
    """The installed torch, which the table does not name."""
    private_api.check_private_names.cache_clear()
    monkeypatch.setitem(private_api.TESTED, "torch", ("2.1", "2.2"))
    yield
    private_api.check_private_names.cache_clear()


@pytest.fixture
def wrapper(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield DistributedDataParallel(nn.Linear(3, 2))
    dist.destroy_process_group()


def test_fsdp2_is_refused_with_the_releases_that_serve(untested_torch):
    with pytest.raises(ValueError, match=r"torch \d.*The tests passed with 2\.1, 2\.2\..*DistributedDataParallel"):
        check_sharding(nn.Linear(2, 2))


def test_the_installed_torch_serves_fsdp2():
    check_sharding(nn.Linear(2, 2))


def test_distributed_data_parallel_is_rebuilt_after_one_warning(untested_torch, wrapper, caplog):
    for size in (4, 5):
        engine = Engine(wrapper)
        engine.replace(engine.model, "weight", torch.zeros(2, size))
        engine.finish()
        wrapper(torch.ones(1, size)).sum().backward()
        assert engine.model.weight.grad.shape == (2, size)
    told = [record.message for record in caplog.records if "was not tested" in record.message]
    assert len(told) == 1 and "The tests passed with 2.1, 2.2." in told[0]


def test_distributed_data_parallel_without_a_name_is_refused_before_anything_changes(wrapper, monkeypatch):
    private_api.check_private_names.cache_clear()
    gone = private_api.PrivateName("torch.nn.parallel.DistributedDataParallel", "_gone_since", "It serves nothing.")
    monkeypatch.setattr(private_api, "PRIVATE_NAMES", (*private_api.PRIVATE_NAMES, gone))
    with pytest.raises(ValueError, match="_gone_since"):
        Engine(wrapper)
    private_api.check_private_names.cache_clear()
