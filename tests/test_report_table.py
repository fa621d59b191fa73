"""Console, log and card show tables that one renderer made."""

from dataclasses import replace

import pytest
import torch
from transformers import TrainerState

from hf_compressm import CompreSSMConfig
from hf_compressm.analysis.recall import RecallResult
from hf_compressm.report import StateReport, Table, cuts_table
from hf_compressm.storage.records import ReductionEvent
from hf_compressm.theory.plan import Selection
from hf_compressm.training.messages import cut_text

EVENT = ReductionEvent(
    step=5,
    layers=[0, 12],
    state_sizes_before=[4, 4],
    state_sizes_after=[2, 3],
    kept_states=[[0, 1], [0, 1, 2]],
    score_discarded=[0.3, 0.1],
    single_layer_loss_change=[0.01, 0.02],
    loss_before=2.0,
    loss_after=2.125,
    tokens=64,
    seconds=1.0,
    measuring_seconds=0.5,
    criterion="output",
    compensate=True,
    hankel_singular_values=[torch.ones(4), torch.ones(4)],
)


@pytest.fixture
def report() -> StateReport:
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    return StateReport(
        config=CompreSSMConfig(target_state_size=2, recall_pairs=2),
        plan={0: Selection(torch.tensor([0, 1])), 12: Selection(torch.tensor([0, 1, 2]))},
        state_sizes_before={0: 4, 12: 4},
        criterion="output",
        compensate=True,
        scores={0: scores, 12: scores},
        hankel_singular_values={0: scores, 12: scores},
        loss_before=2.0,
        loss_after=2.125,
        single_layer_loss_change={0: 0.01, 12: 0.02},
        tokens=64,
        seconds=1.0,
        measuring_seconds=0.5,
        recall_before=RecallResult(0.25, 0.9),
        recall_after=RecallResult(0.5, 0.75),
    )


def test_a_table_is_text_and_markdown():
    table = Table(["layer", "N"], [["0", "16"], ["12", "4-8"]])
    assert table.as_text() == "layer    N\n    0   16\n   12  4-8"
    assert table.as_markdown() == "| layer | N |\n|---|---|\n| 0 | 16 |\n| 12 | 4-8 |"


def test_the_report_shows_every_layer_by_its_index(report):
    assert str(report).splitlines() == [
        "layer  N before  N after  score discarded  single-layer loss change",
        "    0         4        2           30.00%              +0.0100 nats",
        "   12         4        3           10.00%              +0.0200 nats",
        "measured loss: 2.0000 → 2.1250 nats per prediction (+0.1250; the single-layer changes add up to +0.0300)",
        "recall of 2 pairs: 0.2500 → 0.5000 nats per value, 90.0% → 75.0% right (by chance 0.6931, 50.0%)",
    ]


def test_without_losses_the_report_shows_none(report):
    bare = replace(report, loss_before=None, loss_after=None, single_layer_loss_change={}, recall_before=None)
    assert str(bare).splitlines() == [
        "layer  N before  N after  score discarded",
        "    0         4        2           30.00%",
        "   12         4        3           10.00%",
    ]


def test_the_log_shows_the_report_as_the_console_does(report):
    text = cut_text(report, TrainerState(global_step=5, max_steps=20))
    assert text == f"\nCompreSSM, step 5 of 20: state size 4 → 2-3\n{report}"


def test_cuts_are_rows_of_the_card(report):
    later = replace(EVENT, step=None, state_sizes_before=[2, 3], loss_before=None, loss_after=None)
    assert cuts_table([EVENT, later]).as_markdown().splitlines() == [
        "| step | N | score discarded | loss before → after, nats per prediction |",
        "|---|---|---|---|",
        "| 5 | 4 → 2-3 | 30.0% | 2.0000 → 2.1250 |",
        "| after training | 2-3 → 2-3 | 30.0% | not measured |",
    ]


def test_recall_is_a_column_where_any_cut_measured_it():
    told = replace(EVENT, recall_before={"loss": 1.5, "accuracy": 0.75}, recall_after={"loss": 2.0, "accuracy": 0.5})
    table = cuts_table([EVENT, told])
    assert table.headings[-1] == "recall of random pairs, nats per value (accuracy)"
    assert [row[-1] for row in table.rows] == ["not measured", "1.500 (75%) → 2.000 (50%)"]
