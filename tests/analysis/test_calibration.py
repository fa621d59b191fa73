"""Calibration data: which examples are drawn, at what price, and which random states stay as they were."""

import random
import resource
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import build_model
from transformers import default_data_collator

from hf_compressm.analysis.calibration import preserved_random_state, take_batches, undisturbed
from hf_compressm.analysis.drawing import draw_batches
from hf_compressm.analysis.permutation import permutation

LAST_OF_ITS_KIND = 214_748_363  # torch.randperm shuffles in another way from the next size on


@pytest.mark.parametrize("seed", [0, 1, 42, 2**63 - 1])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 64, 1000, 4097, 10**6])
def test_the_permutation_is_that_of_torch(count, seed):
    whole = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    for length in {1, 5, min(count, 3000)}:
        first = list(islice(permutation(count, torch.Generator().manual_seed(seed)), length))
        assert first == whole[:length].tolist()


@pytest.mark.slow
def test_the_permutation_is_that_of_torch_up_to_where_torch_changes_its_own():
    def first_of_both(count):
        whole = torch.randperm(count, generator=torch.Generator().manual_seed(7), dtype=torch.int32)
        return whole[:1000].tolist(), list(islice(permutation(count, torch.Generator().manual_seed(7)), 1000))

    expected, found = first_of_both(LAST_OF_ITS_KIND)
    assert found == expected
    expected, found = first_of_both(LAST_OF_ITS_KIND + 1)
    assert found != expected and len(set(found)) == 1000


class Examples:
    """So many examples, of eight tokens each, the first of which is the example's number."""

    def __init__(self, count: int, without_prediction: range = range(0)):
        self.count, self.without_prediction, self.read = count, without_prediction, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        self.read += 1
        labels = [-100] * 8 if index in self.without_prediction else [1] * 8
        return {"input_ids": [index] * 8, "labels": labels}


def numbers_of(batches) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in batches]


def numbers_in_torchs_order(count, batch_size, seed, step, process, processes) -> list[list[int]]:
    """The batches of a process, out of a permutation of the whole data set."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    order = torch.randperm(count, generator=generator)
    whole = count // (processes * batch_size) * processes * batch_size
    return order[:whole].view(-1, processes, batch_size)[:, process].tolist()


@pytest.mark.parametrize(("process", "processes"), [(0, 1), (0, 2), (1, 2), (2, 3)])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (0, 25), (42, 100), (2**62, 7)])
def test_those_examples_are_drawn_that_a_permutation_of_all_data_begins_with(seed, step, process, processes):
    drawn = draw_batches(Examples(500), default_data_collator, 4, 10, seed, step, process, processes)
    assert numbers_of(drawn) == numbers_in_torchs_order(500, 4, seed, step, process, processes)[:10]


def test_batches_with_nothing_to_predict_are_passed_over():
    data = Examples(64, without_prediction=range(40))
    drawn = numbers_of(draw_batches(data, default_data_collator, 2, 8, 3, 5))
    order = numbers_in_torchs_order(64, 2, 3, 5, 0, 1)
    assert drawn == [batch for batch in order if max(batch) >= 40][:8]
    assert drawn != order[:8]


def test_all_whole_batches_can_be_drawn_and_no_more():
    assert len(draw_batches(Examples(50), default_data_collator, 4, 6, 0, 0, 1, 2)) == 6
    with pytest.raises(ValueError, match="ended after 6 batches, 7 are needed"):
        draw_batches(Examples(50), default_data_collator, 4, 7, 0, 0, 1, 2)


def test_a_thousand_million_examples_cost_no_more_than_those_that_are_drawn():
    data = Examples(10**9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    drawn = numbers_of(draw_batches(data, default_data_collator, 8, 16, 0, 25))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len({number for batch in drawn for number in batch}) == 128 == data.read
    assert max(map(max, drawn)) > LAST_OF_ITS_KIND
    assert grown < 20_000


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, int]]:
    """What is asked of the random generators of a machine with four GPUs, of which torch says so here."""
    asked = []
    state = torch.get_rng_state()

    def number(device) -> int:
        return torch.device("cuda", device).index if isinstance(device, int) else torch.device(device).index

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(
        torch.cuda, "get_rng_state", lambda device="cuda": asked.append(("get", number(device))) or state
    )
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda _, device="cuda": asked.append(("set", number(device))))
    return asked


def test_a_model_on_the_cpu_asks_nothing_of_a_gpu(asked, batches):
    with undisturbed(build_model()):
        torch.rand(1)
    take_batches(batches, 4)
    assert asked == [] and not torch.cuda.is_initialized()


def test_of_several_gpus_those_are_asked_that_are_named(asked):
    with preserved_random_state([torch.device("cpu"), torch.device("cuda", 2), torch.device("cuda", 2)]):
        assert asked == [("get", 2)]
    assert asked == [("get", 2), ("set", 2)]


def drawn_numbers() -> tuple:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_the_random_states_of_python_numpy_and_torch_are_as_before():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = drawn_numbers()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with pytest.raises(KeyError), preserved_random_state():
        drawn_numbers()
        raise KeyError
    assert drawn_numbers() == expected
