"""Pictures: the numbers in their axes are those of a real run, and matplotlib is imported only for them."""

import math
import sys
import textwrap
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import VOCABULARY, build_trainer
from datasets import Dataset
from processes import run_program
from trainer_callbacks import WorseAt
from transformers import set_seed

from hf_compressm import (
    CompreSSMCallback,
    CompreSSMConfig,
    CompreSSMSchedule,
    LRUConfig,
    LRUForSequenceClassification,
    analyze,
)
from hf_compressm.plotting import (
    plot_accuracy,
    plot_event_spectra,
    plot_kept_share,
    plot_loss,
    plot_score_map,
    plot_spectra,
    plot_state_sizes,
    plot_trajectories,
    save_figure,
)
from hf_compressm.storage.history import History
from hf_compressm.theory.hankel import truncation_rank

CUTS, OBSERVED = [5, 10], [3, 6, 9, 12, 15, 18]
RESULTS = [
    {"arm": "reduced", "state_size": 57.3, "accuracy": [0.90, 0.92, 0.94]},
    {"arm": "from scratch", "state_size": 64, "accuracy": [0.93]},
    {"arm": "reduced", "state_size": 14, "accuracy": [0.80, 0.84]},
    {"arm": "reduced", "state_size": 256, "accuracy": [0.95, 0.95]},
]


def build_lru(layers: int = 2) -> LRUForSequenceClassification:
    set_seed(0)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=8, state_size=12, num_hidden_layers=layers, num_labels=4)
    return LRUForSequenceClassification(LRUConfig(**sizes))


@pytest.fixture(scope="module")
def history(blocks, tmp_path_factory):
    """A run that cuts layer 0 at steps 5 and 10, leaves layer 1 alone, and observes in between."""
    callback = CompreSSMCallback(
        CompreSSMConfig(target_state_size=6, skip_layers=[1]),
        CompreSSMSchedule(end=0.5, events=2, monitor_steps=3),
    )
    dataset = Dataset.from_dict({"input_ids": blocks.tolist(), "labels": (blocks[:, 0] % 4).tolist()})
    build_trainer(tmp_path_factory.mktemp("run"), dataset, [callback], model=build_lru()).train()
    assert [event.step for event in callback.history.events] == CUTS
    assert [observation.step for observation in callback.history.observations] == OBSERVED
    return callback.history


@pytest.fixture(scope="module")
def rolled_back(dataset, tmp_path_factory):
    """History and log of a run that cuts layers 16 → 8 at step 5, undoes it at step 6, cuts 16 → 12 at step 10."""
    callback = CompreSSMCallback(
        CompreSSMConfig(cut_fraction=0.5),
        CompreSSMSchedule(end=0.5, events=2, rollback_tolerance=0.05, on_rollback="halve"),
    )
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": dataset.select(range(16))}
    trainer = build_trainer(tmp_path_factory.mktemp("run"), dataset, [WorseAt(6, value=9.0), callback], **options)
    trainer.train()
    events = callback.history.events
    assert [(event.step, event.rolled_back_at, event.state_sizes_after) for event in events] == [
        (5, 6, [8, 8]),
        (10, None, [12, 12]),
    ]
    return callback.history, trainer.state.log_history


def resized(history: History, *changes: tuple) -> History:
    """Of changes (step, before, after, rolled back at): events with the spectra of the history's first."""
    names = ("step", "state_sizes_before", "state_sizes_after", "rolled_back_at")
    layers = list(range(len(changes[0][1]))) if changes else []
    changes = [dict(zip(names, change, strict=True)) for change in changes]
    events = [replace(history.events[0], layers=layers, **change) for change in changes]
    return replace(history, events=events, observations=[])


def spectra_of(layers: int) -> dict[int, torch.Tensor]:
    return analyze(build_lru(layers), None, CompreSSMConfig(tolerance=0.05)).hankel_singular_values


def heights(line) -> torch.Tensor:
    return torch.tensor([float(y) for y in line.get_ydata()], dtype=torch.float64)


def legend_of(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def vertical_lines(axes) -> list:
    return [line for line in axes.lines if line.get_linestyle() == "--"]


def curves(axes) -> list:
    return [line for line in axes.lines if line.get_linestyle() == "-"]


def test_spectra_stand_in_the_axes_as_shares_of_the_largest():
    spectra = spectra_of(2)
    (axes,) = plot_spectra(spectra).axes
    assert axes.get_yscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "rank $i$",
        r"Hankel singular value $\sigma_i\,/\,\sigma_1$",
    )
    assert legend_of(axes) == ["layer 0", "layer 1"]
    for line, sigma in zip(axes.lines, spectra.values(), strict=True):
        assert list(line.get_xdata()) == list(range(1, 13))
        torch.testing.assert_close(heights(line), sigma / sigma[0])


def test_spectra_may_vanish_and_say_their_layers():
    (axes,) = plot_spectra({0: torch.tensor([2.0, 1e-11, 0.0]), 1: torch.zeros(1)}).axes
    assert [heights(line).tolist() for line in axes.lines] == [[1.0, 1e-10, 1e-10], [1e-10]]
    assert axes.lines[1].get_marker() == "."  # a single value would not show as a line
    with pytest.raises(ValueError, match="no spectra"):
        plot_spectra({})
    with pytest.raises(ValueError, match="spectra were given as a list, which says no layers; give a dict"):
        plot_spectra([torch.ones(2)])


def test_many_layers_are_told_apart_by_a_colour_bar():
    axes, bar = plot_spectra(spectra_of(12)).axes
    assert axes.get_legend() is None
    assert bar.get_ylabel() == "layer" and bar.get_ylim() == (0, 11)
    greens = [line.get_color()[1] for line in axes.lines]
    assert greens == sorted(greens) and len(set(greens)) == 12  # dark to light, along depth


def test_a_trajectory_follows_a_singular_value_until_it_is_cut(history):
    records = sorted([*history.observations, *history.events], key=lambda record: record.step)
    above, _, bar = plot_trajectories(history).axes
    assert (above.get_yscale(), above.get_ylabel()) == ("log", r"singular value $\sigma_i$")
    assert bar.get_ylabel() == "rank $i$" and bar.get_ylim() == (1, 12)
    lines = curves(above)
    assert len(lines) == 12
    for i, line in enumerate(lines):
        alive = [record for record in records if i < len(record.hankel_singular_values[0])]
        assert list(line.get_xdata()) == [record.step for record in alive]
        assert heights(line).tolist() == [float(record.hankel_singular_values[0][i]) for record in alive]
    assert [line.get_xdata()[-1] for line in (lines[0], lines[5], lines[6], lines[11])] == [18, 18, 10, 5]


def test_the_spectra_of_events_are_dots(history):
    dots = plot_trajectories(history).axes[0].collections
    for group, event in zip(dots, history.events, strict=True):
        steps, sigma = group.get_offsets().T.tolist()
        assert set(steps) == {event.step} and sigma == event.hankel_singular_values[0].tolist()


def test_cuts_are_marked_where_the_layer_was_cut(history):
    above, below = plot_trajectories(history).axes[:2]
    sizes = [(event.state_sizes_before[0], event.state_sizes_after[0]) for event in history.events]
    assert sizes[0][0] == 12 and sizes[-1][1] == 6
    assert [text.get_text() for text in above.texts] == [f"N {before} → {after}" for before, after in sizes]
    assert [text.xy[0] for text in above.texts] == CUTS
    assert [[line.get_xdata()[0] for line in vertical_lines(axes)] for axes in (above, below)] == [CUTS, CUTS]

    spared = plot_trajectories(history, layer=1).axes[0]
    assert not spared.texts and not vertical_lines(spared)
    assert all(line.get_xdata()[-1] == OBSERVED[-1] for line in curves(spared))


@pytest.mark.parametrize("layer", [0, 1])
def test_movement_and_bound_are_shares_of_the_largest_with_gaps(history, layer):
    below = plot_trajectories(history, layer).axes[1]
    assert (below.get_xlabel(), below.get_ylabel()) == ("optimizer step", r"change (% of $\sigma_1$)")
    assert legend_of(below) == ["Weyl's bound", "largest movement"]
    bound, movement = curves(below)
    assert list(bound.get_xdata()) == list(movement.get_xdata()) == OBSERVED
    compared = [observation.movement is not None for observation in history.observations]
    assert compared == [False, False, True, False, True, True]
    assert (
        [not math.isnan(y) for y in movement.get_ydata()] == [not math.isnan(y) for y in bound.get_ydata()] == compared
    )
    last = history.observations[-1]
    largest = float(last.hankel_singular_values[layer][0])
    assert movement.get_ydata()[-1] == pytest.approx(100 * last.movement[layer] / largest)
    assert bound.get_ydata()[-1] == pytest.approx(100 * last.weyl_bound[layer] / largest)


def test_a_bound_that_there_is_not_is_not_named(history):
    observations = [replace(observation, weyl_bound=None) for observation in history.observations]
    assert legend_of(plot_trajectories(replace(history, observations=observations)).axes[1]) == ["largest movement"]


def test_a_single_observation_shows_as_dots(history):
    above, below = plot_trajectories(replace(history, events=[], observations=history.observations[:1])).axes[:2]
    assert len(above.lines) == 12 and all(line.get_marker() == "." for line in above.lines)
    assert [text.get_text() for text in below.texts] == ["no comparable observations"]
    assert below.get_legend() is None


def test_a_single_state_needs_no_colour_bar(history):
    first = history.observations[0]
    lone = replace(first, hankel_singular_values=[sigma[:1] for sigma in first.hankel_singular_values])
    assert len(plot_trajectories(replace(history, events=[], observations=[lone])).axes) == 2


def test_events_outside_of_training_have_no_place_on_the_axis(history):
    with_stray = replace(history, events=[*history.events, replace(history.events[0], step=None)])
    assert [text.xy[0] for text in plot_trajectories(with_stray).axes[0].texts] == CUTS


def test_trajectories_of_what_was_not_recorded_are_refused(history):
    with pytest.raises(ValueError, match=r"no observations.*CompreSSMSchedule\(monitor_steps=\.\.\.\)"):
        plot_trajectories(replace(history, observations=[]))
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=f"layer = {layer}; allowed: 0, 1"):
            plot_trajectories(history, layer)


def test_kept_share_marks_the_rank_of_every_tolerance():
    spectra, tolerances = spectra_of(2), [0.2, 0.05]
    (axes,) = plot_kept_share(spectra, tolerances).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rank $r$", r"share of $\Sigma\sigma$ kept (%)")
    assert legend_of(axes) == ["layer 0", "layer 1"]
    dots = [line for line in axes.lines if line.get_linestyle() == "None"]
    for line, marks, sigma in zip(curves(axes), dots, spectra.values(), strict=True):
        torch.testing.assert_close(
            heights(line), torch.stack([100 * sigma[:r].sum() / sigma.sum() for r in range(1, 13)])
        )
        ranks = [truncation_rank(sigma, tolerance, min_reduction=0.0) for tolerance in tolerances]
        assert list(marks.get_xdata()) == ranks
        assert heights(marks).tolist() == [heights(line)[rank - 1] for rank in ranks]
        assert marks.get_color() == line.get_color()
    assert [line.get_ydata()[0] for line in vertical_lines(axes)] == [80, 95]
    assert [text.get_text() for text in axes.texts] == [r"$\tau$ = 0.2", r"$\tau$ = 0.05"]


def test_accuracies_are_means_over_seeds_with_their_deviation():
    (axes,) = plot_accuracy(RESULTS).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("final state size $N$", "accuracy (%)")
    assert legend_of(axes) == ["reduced", "from scratch"]
    named = plot_accuracy([RESULTS[0] | {"arm": "$5 \\frac and $6"}])  # no mathematics
    assert legend_of(*named.axes) == [r"\$5 \frac and \$6"]
    named.canvas.draw()
    reduced, scratch = axes.containers
    assert list(reduced.lines[0].get_xdata()) == [14, 57.3, 256]
    assert list(reduced.lines[0].get_ydata()) == pytest.approx([82, 92, 95])
    assert (list(scratch.lines[0].get_xdata()), list(scratch.lines[0].get_ydata())) == ([64], [93])
    assert (reduced.lines[0].get_linestyle(), scratch.lines[0].get_linestyle()) == ("-", "None")
    assert reduced.lines[0].get_marker() != scratch.lines[0].get_marker()
    lengths = [bar[1, 1] - bar[0, 1] for bar in reduced.lines[2][0].get_segments()]
    assert lengths == pytest.approx([2 * 8**0.5, 4, 0])
    assert not [bar for bar in scratch.lines[2][0].get_segments() if len(bar)]  # one seed has no deviation
    with pytest.raises(ValueError, match="no results"):
        plot_accuracy([])


def test_sizes_are_plain_numbers_where_there_is_room():
    (axes,) = plot_accuracy(RESULTS).axes
    labels = {
        float(tick): label.get_text() for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    }
    assert axes.get_xscale() == "log"
    assert labels == {14: "14", 64: "64", 256: "256"}  # 57.3 would run into 64
    assert list(axes.get_xticks(minor=True)) == [57.3]
    (axes,) = plot_accuracy(RESULTS[:1]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["57.3"]


def test_the_score_map_shows_shares_in_per_cent_from_the_largest_down():
    scores = {0: torch.tensor([1.0, 4.0, 3.0]), 1: torch.tensor([20.0]), 4: torch.tensor([1.0, 3.0])}
    axes, bar = plot_score_map(scores).axes
    (image,) = axes.images
    assert image.get_array().tolist() == [[50, 37.5, 12.5], [100, None, None], [75, 25, None]]
    assert image.get_extent() == [0.5, 3.5, 2.5, -0.5] and axes.patch.get_hatch()  # which shows where nothing is
    assert (image.norm.vmin, image.norm.vmax) == (10, 100) and type(image.norm).__name__ == "LogNorm"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("state, by rank $i$", "layer")
    assert bar.get_ylabel() == "share of score (%)" and image.colorbar.extend == "neither"
    assert not len(bar.get_yticks(minor=True))
    assert [label.get_text() for label in bar.get_yticklabels() if 10 <= label.get_position()[1] <= 100] == [
        "10",
        "20",
        "50",
        "100",
    ]
    assert [axes.yaxis.get_major_formatter()(row) for row in range(-1, 4)] == ["", "0", "1", "4", ""]
    assert not axes.lines and axes.get_legend() is None


def test_the_score_map_of_a_report_marks_what_it_keeps():
    report = analyze(build_lru(3), None, CompreSSMConfig(tolerance=0.1))
    sizes = list(report.state_sizes.values())
    assert min(sizes) < 12
    axes = plot_score_map(report.scores, report.state_sizes).axes[0]
    (line,) = axes.lines
    assert list(line.get_xdata()) == [sizes[row] + 0.5 for row in (0, 0, 1, 1, 2, 2)]
    assert list(line.get_ydata()) == [-0.5, 0.5, 0.5, 1.5, 1.5, 2.5]
    assert legend_of(axes) == ["kept: what lies left of the line"]
    for row, score in zip(axes.images[0].get_array(), report.scores.values(), strict=True):
        assert row.tolist() == pytest.approx((100 * score / score.sum()).tolist())


def test_the_score_map_ends_where_scores_no_longer_count():
    axes, _ = plot_score_map({0: torch.tensor([1.0, 1e-3, 1e-9, 0.0]), 1: torch.zeros(4)}).axes
    (image,) = axes.images
    assert image.get_array().tolist()[1] == [1e-4] * 4 and image.get_array().tolist()[0][2:] == [1e-4] * 2
    assert image.norm.vmin == 1e-4 and image.colorbar.extend == "min"
    (image,) = plot_score_map({0: torch.zeros(4)}).axes[0].images
    assert image.norm.vmin < image.norm.vmax


def test_the_score_map_grows_with_depth():
    heights = [plot_score_map(dict.fromkeys(range(layers), torch.ones(8))).get_figheight() for layers in (1, 24, 64)]
    assert heights == pytest.approx([2.4, 4.92, 7])


@pytest.mark.parametrize("score", [[1.0, -1.0], [1.0, math.nan], [math.inf], [], [[[1.0]]], 1.0])
def test_a_map_of_what_are_no_scores_is_refused(score):
    with pytest.raises(ValueError, match=r"scores of layer 1 have the shape .* give \(N,\) finite numbers ≥ 0"):
        plot_score_map({0: torch.ones(2), 1: torch.tensor(score)})


def test_sizes_that_do_not_fit_the_scores_are_refused():
    with pytest.raises(ValueError, match="no spectra"):
        plot_score_map({})
    with pytest.raises(
        ValueError, match=r"state_sizes = {0: 1}, and there are scores of the layers \[0, 1\]; give a dict"
    ):
        plot_score_map(dict.fromkeys(range(2), torch.ones(2)), {0: 1})
    for size in (-1, 3):
        with pytest.raises(ValueError, match=rf"state_sizes\[1\] = {size}; allowed: 0 … 2"):
            plot_score_map(dict.fromkeys(range(2), torch.ones(2)), {0: 2, 1: size})


def test_every_event_gets_a_panel_of_its_spectra(history):
    figure = plot_event_spectra(history)
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log"]
    assert (figure.get_supxlabel(), figure.get_supylabel()) == (
        "rank $i$",
        r"Hankel singular value $\sigma_i\,/\,\sigma_1$",
    )
    means = []
    for axes, event in zip(figure.axes, history.events, strict=True):
        before, after = event.state_sizes_before, event.state_sizes_after
        title = f"step {event.step}\nmean N {sum(before) / 2:g} → {sum(after) / 2:g}"
        assert axes.get_title("left") == title
        shares = [sigma / sigma[0] for sigma in event.hankel_singular_values]
        line, *_ = axes.lines
        means.append(heights(line))
        assert list(line.get_xdata()) == list(range(1, min(before) + 1))
        torch.testing.assert_close(means[-1], torch.stack([(a * b).sqrt() for a, b in zip(*shares, strict=False)]))
        (band,) = axes.collections
        outline = band.get_paths()[0].vertices
        for i in range(max(before)):
            ranked = [float(share[i]) for share in shares if i < len(share)]
            drawn = outline[outline[:, 0] == i + 1, 1]
            assert (drawn.min(), drawn.max()) == pytest.approx((min(ranked), max(ranked)))
        assert [line.get_xdata()[0] for line in vertical_lines(axes)] == [sum(after) / 2 + 0.5]
        (bar,) = [line for line in axes.lines if line.get_label() == "range of cuts"]
        assert list(bar.get_xdata()) == [min(after) + 0.5, max(after) + 0.5]
    for axes, others in zip(figure.axes, (means[1:], means[:1]), strict=True):
        drawn = [heights(line) for line in axes.lines if line.get_label() == "other events"]
        assert len(drawn) == 1 and torch.equal(drawn[0], others[0])
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == [
        "cut",
        "mean over layers",
        "other events",
        "range of cuts",
        "range over layers",
    ]


def test_events_after_training_those_undone_and_those_without_a_cut_are_named(history):
    with_others = resized(
        history,
        (5, [12, 12], [8, 8], 6),
        (7, [12, 12], [12, 12], None),
        (9, [12, 12], [12, 12], 10),
        (None, [12, 12], [7, 7], None),
    )
    panels = plot_event_spectra(with_others).axes
    titles = ["step 5, undone at 6\nN 12 → 8", "step 7\nnot cut", "step 9\nnot cut", "after training\nN 12 → 7"]
    assert [axes.get_title("left") for axes in panels] == titles
    assert [[line.get_xdata()[0] for line in vertical_lines(axes)] for axes in panels] == [[8.5], [], [], [7.5]]
    assert not [line for axes in panels for line in axes.lines if line.get_label() == "range of cuts"]
    first, second, third, last = [axes.lines[0].get_color() for axes in panels]
    assert first[1] < second[1] < third[1] and last == "#D55E00"  # dark to light, along the steps


@pytest.mark.parametrize("events, rows, columns, numbered", [(1, 1, 1, [0]), (4, 2, 2, [2, 3]), (5, 2, 3, [2, 3, 4])])
def test_panels_of_events_fill_a_grid(history, events, rows, columns, numbered):
    figure = plot_event_spectra(resized(history, *[(step, [12, 12], [12, 12], None) for step in range(1, events + 1)]))
    figure.canvas.draw()
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert figure.axes[0].get_gridspec().get_geometry() == (rows, columns) and len(panels) == events
    assert [i for i, axes in enumerate(panels) if axes.xaxis.get_tick_params()["labelbottom"]] == numbered


def test_a_single_state_shows_as_a_dot_and_a_vanishing_value_at_the_floor(history):
    spectra = [torch.tensor([2.0]), torch.tensor([0.0])]
    (axes,) = plot_event_spectra(
        replace(history, events=[replace(history.events[0], hankel_singular_values=spectra)])
    ).axes
    assert axes.lines[0].get_marker() == "." and heights(axes.lines[0]).tolist() == pytest.approx([1e-5])


def test_spectra_of_no_event_are_refused(history):
    for events in ([], [replace(history.events[0], hankel_singular_values=[])]):
        with pytest.raises(ValueError, match="no spectra of events: train with a CompreSSMCallback"):
            plot_event_spectra(replace(history, events=events))


def test_one_line_goes_down_with_the_cuts_and_up_again_with_a_rollback(rolled_back):
    (axes,) = plot_state_sizes(rolled_back[0], max_steps=20).axes
    (line,) = curves(axes)
    assert line.get_drawstyle() == "steps-post"
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 5, 6, 10, 20], [16, 8, 16, 12, 12])
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("optimizer step", "state size $N$", "log")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["8", "16", "12"]
    (dotted,) = [line for line in axes.lines if line.get_linestyle() == ":"]
    (span,) = axes.patches
    assert dotted.get_xdata()[0] == 6 and (span.get_x(), span.get_width()) == (5, 1)
    assert [(text.get_text(), text.xy[0]) for text in axes.texts] == [("rollback", 6)]
    assert axes.get_legend() is None and not vertical_lines(axes)


def test_a_cut_undone_at_its_own_step_goes_down_and_up_there(history):
    at_once = resized(history, (5, [16], [8], 7), (7, [8], [4], 7))  # both undone by the evaluation after step 7
    (axes,) = plot_state_sizes(at_once, 20).axes
    (line,) = curves(axes)
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 5, 7, 7, 20], [16, 8, 4, 16, 16])
    assert [(span.get_x(), span.get_width()) for span in axes.patches] == [(5, 2)]


def test_layers_of_different_sizes_get_a_line_each(history):
    (axes,) = plot_state_sizes(history, 20).axes
    cut, spared = axes.lines
    assert list(cut.get_xdata()) == list(spared.get_xdata()) == [0, *CUTS, 20]
    sizes = [12, *(event.state_sizes_after[0] for event in history.events)]
    assert (list(cut.get_ydata()), list(spared.get_ydata())) == ([*sizes, sizes[-1]], [12] * 4)
    assert legend_of(axes) == ["layer 0", "layer 1"]
    assert {"6", "12"} <= {label.get_text() for label in axes.get_yticklabels()}  # not 8, the only power of two
    assert cut.get_color()[1] < spared.get_color()[1] and cut.get_linewidth() > spared.get_linewidth()

    deep = resized(history, (5, [64] * 24, list(range(12, 36)), None))
    axes, bar = plot_state_sizes(deep).axes
    assert len(axes.lines) == 24 and bar.get_ylim() == (0, 23) and axes.get_legend() is None
    assert [label.get_text() for label in axes.get_yticklabels()] == ["16", "32", "64"]


def test_very_many_layers_are_drawn_as_mean_and_range(history):
    (axes,) = plot_state_sizes(resized(history, (5, [64] * 33, [10] * 11 + [20] * 22, None)), 20).axes
    (line,) = axes.lines
    assert list(line.get_ydata()) == pytest.approx([64, 50 / 3, 50 / 3])
    corners = {tuple(vertex) for vertex in axes.collections[0].get_paths()[0].vertices}
    assert corners >= {(0, 64), (5, 10), (5, 20), (20, 10), (20, 20)} and not corners & {(0, 10), (0, 20)}
    assert sorted(legend_of(axes)) == ["mean over layers", "range over layers"]


def test_cuts_after_training_come_after_its_end(history):
    later = resized(history, (10, [16], [8], None), (None, [8], [4], None), (None, [4], [2], None))
    for max_steps, end in ((None, 10), (20, 20)):
        (axes,) = plot_state_sizes(later, max_steps).axes
        (line,) = curves(axes)
        assert list(line.get_xdata()) == pytest.approx([0, 10, 1.05 * end, 1.1 * end, 1.15 * end])
        assert list(line.get_ydata()) == [16, 8, 4, 2, 2]
        places = pytest.approx([1.05 * end, 1.1 * end])
        assert [text.xy[0] for text in axes.texts] == [line.get_xdata()[0] for line in vertical_lines(axes)] == places
        assert {text.get_text() for text in axes.texts} == {"after training"}


def test_lines_go_on_to_the_last_step_that_is_known_of_and_past_a_last_cut(history):
    (axes,) = plot_state_sizes(history).axes
    assert axes.lines[0].get_xdata()[-1] == OBSERVED[-1]
    (axes,) = plot_state_sizes(replace(history, observations=[])).axes
    assert axes.lines[0].get_xdata()[-1] == pytest.approx(1.05 * CUTS[-1])
    (axes,) = plot_state_sizes(replace(history, events=[])).axes
    assert list(axes.lines[0].get_ydata()) == [12, 12]  # before any cut


def test_sizes_over_no_steps_are_refused(history):
    for nothing in (resized(history), resized(history, (None, [8], [4], None))):
        with pytest.raises(ValueError, match="no event or observation in training: train with a CompreSSMCallback"):
            plot_state_sizes(nothing, 20)
    with pytest.raises(ValueError, match="max_steps = 17; the history goes on to step 18"):
        plot_state_sizes(history, 17)
    with pytest.raises(ValueError, match="max_steps = 6; the history goes on to step 7"):
        plot_state_sizes(resized(history, (5, [16], [8], 7)), 6)


def test_the_loss_is_that_of_the_log_with_cuts_and_rollbacks(rolled_back):
    history, log = rolled_back
    (axes,) = plot_loss(log, history).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "loss (nats per prediction)")
    assert legend_of(axes) == ["training", "evaluation"]
    (training,) = curves(axes)
    (evaluation,) = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert list(training.get_xdata()) == list(range(1, 21)) and training.get_marker() == ""
    assert list(training.get_ydata()) == [entry["loss"] for entry in log if "loss" in entry]
    assert list(evaluation.get_xdata()) == list(range(2, 21, 2)) and evaluation.get_marker() == "o"
    assert list(evaluation.get_ydata()) == [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert [line.get_xdata()[0] for line in vertical_lines(axes)] == [5, 10]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [6]
    assert [(span.get_x(), span.get_width()) for span in axes.patches] == [(5, 1)]
    notes = [(text.get_text(), text.xy[0]) for text in axes.texts]
    assert notes == [("N 16 → 8", 5), ("rollback", 6), ("N 16 → 12", 10)]
    assert axes.texts[0].get_color() == axes.texts[2].get_color() != axes.texts[1].get_color() == "#D55E00"


def test_what_was_not_cut_in_training_is_not_marked_in_the_loss(history):
    others = resized(history, (5, [8, 4], [8, 4], None), (6, [8, 4], [6, 3], None), (None, [6, 3], [2, 2], None))
    (axes,) = plot_loss([{"loss": 2.0, "step": 10}], others).axes
    assert [text.get_text() for text in axes.texts] == ["mean N 6 → 4.5"]
    assert curves(axes)[0].get_marker() == "."  # a single value would not show as a line


@pytest.mark.parametrize("cut, shown", [(50, 4.0), (10, 6.0)])
def test_a_steep_start_is_left_out_but_no_cut(history, cut, shown):
    losses = {5: 10.0, 10: 6.0, 20: 4.0, 500: 2.5, 800: math.inf, 900: math.nan, 1000: 2.0}
    log = [{"loss": loss, "step": step} for step, loss in losses.items()]
    (axes,) = plot_loss(log, resized(history, (cut, [16], [8], None))).axes
    bottom, top = axes.get_ylim()
    assert bottom < 2 and top == pytest.approx(shown + 0.05 * (shown - bottom))
    assert heights(axes.lines[0])[0] == 10  # though it lies above


def test_the_axis_of_a_loss_without_a_steep_start_is_as_high_as_it_is(history):
    for losses in ([2.0, 2.0], [2.0, 3.0], [2.0, math.nan]):
        log = [{"loss": loss, "step": 500 * i} for i, loss in enumerate(losses)]
        (axes,) = plot_loss(log, resized(history)).axes
        bottom, top = axes.get_ylim()
        assert bottom < 2 and top > max(losses)


def test_evaluations_alone_make_a_picture_and_a_log_without_losses_none(history):
    (axes,) = plot_loss([{"eval_loss": 2.0, "step": 10}], history).axes
    assert legend_of(axes) == ["evaluation"]
    for log, seen in (
        ([], r"\[\]"),
        ([{"step": 3, "train_loss": 2.0}, {"loss": 1.0}], "'loss', 'step', 'train_loss'"),
    ):
        with pytest.raises(ValueError, match=rf"no loss and no eval_loss with a step, but .*{seen}.*log_history"):
            plot_loss(log, history)


def notes_above(history, steps) -> list:
    cuts = resized(history, *[(step, [16], [8], None) for step in steps])
    (axes,) = plot_loss([{"loss": 2.0, "step": 0}, {"loss": 1.0, "step": 1000}], cuts).axes
    assert axes.get_xlim() == (-50, 1050)
    return axes.texts


def test_notes_that_would_run_into_each_other_move_apart(history):
    steps = [0, 1, 500, 501, 502, 900]
    notes = notes_above(history, reversed(steps))
    own, places = [(step + 50) / 1100 for step in steps], [note.xyann[0] for note in notes]
    assert [note.xy[0] for note in notes] == steps
    assert all(right - left >= 0.03 - 1e-9 for left, right in pairwise(places))
    assert places[5] == own[5] and places[3] == pytest.approx(own[3])
    assert [note.arrow_patch is not None for note in notes] == [True, True, True, False, True, False]

    crowd = [note.xyann[0] for note in notes_above(history, [500, 540, 541, 542])]  # which reaches the first, too
    assert crowd == pytest.approx([(530.75 + 50) / 1100 + 0.03 * (i - 1.5) for i in range(4)])
    crowd = [note.xyann[0] for note in notes_above(history, range(30))]
    assert crowd == pytest.approx([0.03 * i for i in range(30)])  # pushed to the right from the edge
    crowd = [note.xyann[0] for note in notes_above(history, range(970, 1000))]
    assert crowd == pytest.approx([1 - 0.03 * i for i in reversed(range(30))])


def test_of_more_notes_than_fit_some_are_left_out(history):
    notes = notes_above(history, range(0, 1000, 10))
    assert [note.xy[0] for note in notes] == list(range(0, 1000, 30))


@pytest.mark.parametrize("name, start", [("run.png", b"\x89PNG"), ("run.pdf", b"%PDF"), ("run.svg", b"<?xml")])
def test_a_saved_figure_is_whole_and_alone(tmp_path, history, name, start):
    path = tmp_path / "plots" / name
    for _ in range(2):
        save_figure(plot_trajectories(history), path)
    assert path.read_bytes().startswith(start) and path.stat().st_size > 10_000
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_save_leaves_the_picture_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "accuracy.png"
    path.write_bytes(b"before")
    figure = plot_accuracy(RESULTS)

    def fail(target, **options):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, str(path))
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_matplotlib_is_imported_by_a_picture_only_and_pyplot_by_none():
    check = """
        import sys
        import hf_compressm.plotting
        assert not [name for name in sys.modules if name.startswith("matplotlib")]
        hf_compressm.plotting.plot_accuracy([{"arm": "a", "state_size": 4, "accuracy": [0.5]}])
        assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
    """
    run_program(textwrap.dedent(check))


def test_without_matplotlib_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_spectra({0: torch.ones(2)})
