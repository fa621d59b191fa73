"""The picture of settling: each layer's ranking against its noise, and the step at which it was cut."""

import math
from dataclasses import replace

import pytest

from hf_compressm.plotting import plot_settling, save_figure
from hf_compressm.sharing.pictures import write_pictures


def test_a_picture_shows_every_layer_with_the_noise_and_its_cut(settling_run, tmp_path):
    history = settling_run[1].history
    figure = plot_settling(history)
    compared = [seen for seen in history.observations if seen.settled_points is not None]
    for layer, (axes, event) in enumerate(zip(figure.axes, reversed(history.events), strict=True)):
        noise, moved, still, cut = axes.lines
        assert list(noise.get_ydata()) == [seen.rank_noise[layer] for seen in history.observations if seen.rank_noise]
        assert list(moved.get_xdata()) == [seen.step for seen in compared]
        assert list(still.get_xdata()) == [seen.step for seen in compared if seen.settled_points[layer]]
        assert list(cut.get_xdata()) == [event.step] * 2 and [text.get_text() for text in axes.texts] == ["settled"]
        gaps = [seen.rank_correlation[layer] is None for seen in compared]
        assert [math.isnan(y) for y in moved.get_ydata()] == gaps
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["two calibration draws", "now and earlier, one draw", "within the noise"]
    save_figure(figure, tmp_path / "settling.png")


def test_a_picture_of_one_layer_shows_its_score_shares_as_well(settling_run):
    history = settling_run[1].history
    above, below = plot_settling(history, layer=1).axes
    compared = [seen for seen in history.observations if seen.settled_points is not None]
    distances = [seen.share_distance[1] for seen in compared if seen.share_distance[1] is not None]
    assert [y for y in below.lines[1].get_ydata() if not math.isnan(y)] == distances
    assert below.get_ylabel() == "distance of score shares" and above.get_title(loc="left") == "layer 1"
    with pytest.raises(ValueError, match="layer = 2; allowed: 0, 1, or None for all"):
        plot_settling(history, layer=2)
    with pytest.raises(ValueError, match="no comparison of rankings: train with CompreSSMSchedule"):
        plot_settling(replace(history, observations=[]))


def test_the_picture_lies_beside_the_final_model(settling_run, tmp_path):
    write_pictures(tmp_path, settling_run[1].history)
    assert (tmp_path / "settling.png").stat().st_size > 10_000
    write_pictures(tmp_path / "none", replace(settling_run[1].history, observations=[]))
    assert not (tmp_path / "none" / "settling.png").exists()
