"""The second axis of spectra that predict an error, and the map of scores of groups."""

import pytest
import torch
from scalar_decay_models import build_mamba2

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.plotting import plot_event_spectra, plot_score_map, plot_spectra, save_figure
from hf_compressm.storage.history import History
from hf_compressm.theory.criteria import scores_by_rank

SIGMA = torch.tensor([2.0, 1.0, 0.5, 1e-9], dtype=torch.float64)


def test_the_second_axis_shows_the_error_of_every_size(tmp_path):
    figure = plot_spectra({0: SIGMA, 3: torch.ones(2)}, with_error=True)
    axes, errors = figure.axes
    assert errors.get_yscale() == "log" and "squared error predicted" in errors.get_ylabel()
    assert list(errors.lines[0].get_xdata()) == [1, 2, 3]
    assert list(errors.lines[0].get_ydata()) == pytest.approx([1.25 / 5.25, 0.25 / 5.25, 1e-10])
    assert list(errors.lines[1].get_ydata()) == [0.5]
    colors = [[line.get_color() for line in each.lines] for each in (axes, errors)]
    assert colors[0] == colors[1]
    save_figure(figure, tmp_path / "spectra.png")
    assert len(plot_spectra({0: SIGMA}).axes) == 1


@pytest.fixture(scope="module")
def history(blocks) -> History:
    batches = [{"input_ids": block, "labels": block} for block in blocks[:32].split(8)]
    model, events = build_mamba2(), []
    for size in (8, 4, 2):
        config = CompreSSMConfig(target_state_size=size, basis="balanced")
        events.append(compress(model, analyze(model, batches, config), step=80 // size))
    return History({}, events=events)


def test_events_whose_spectra_predict_an_error_have_a_second_axis(history, tmp_path):
    figure = plot_event_spectra(history)
    panels, errors = figure.axes[:3], figure.axes[3:]
    assert len(errors) == 3 and len({each.get_ylim() for each in errors}) == 1
    for event, each in zip(history.events, errors, strict=True):
        squares = torch.stack([sigma.square() for sigma in event.hankel_singular_values])
        share = (squares[:, 1:].sum(1) / squares.sum(1)).log().mean().exp()
        assert each.lines[0].get_ydata()[0] == pytest.approx(float(share))
    assert [each.get_ylabel() != "" for each in errors] == [False, False, True]
    assert "squared error predicted" in [text.get_text() for text in figure.legends[0].get_texts()]
    save_figure(figure, tmp_path / "events.png")
    for event in history.events:
        event.predicted_error = None
    assert len(plot_event_spectra(history).axes) == len(panels)


def test_the_map_adds_up_the_scores_of_equal_rank_in_all_groups():
    scores = torch.tensor([[1.0, 5.0, 2.0], [4.0, 0.0, 6.0]])
    (image,) = plot_score_map({0: scores}, {0: 2}).axes[0].images
    expected = scores_by_rank(scores) / scores.sum() * 100
    assert image.get_array().tolist()[0] == pytest.approx(expected.tolist())
