"""Pictures: the numbers in their axes are those of a real run, and matplotlib is imported only for them."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import VOCABULARY, build_trainer
from datasets import Dataset
from transformers import set_seed

from hf_compressm import (
    CompreSSMCallback,
    CompreSSMConfig,
    CompreSSMSchedule,
    LRUConfig,
    LRUForSequenceClassification,
    analyze,
)
from hf_compressm.hankel import truncation_rank
from hf_compressm.plotting import plot_accuracy, plot_kept_energy, plot_spectra, plot_trajectories, save_figure

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


def test_spectra_may_come_as_a_list_and_vanish():
    (axes,) = plot_spectra([torch.tensor([2.0, 1e-11, 0.0]), torch.zeros(1)]).axes
    assert [heights(line).tolist() for line in axes.lines] == [[1.0, 1e-10, 1e-10], [1e-10]]
    assert axes.lines[1].get_marker() == "."  # a single value would not show as a line
    with pytest.raises(ValueError, match="no spectra"):
        plot_spectra([])


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
        with pytest.raises(ValueError, match=f"layer = {layer}; allowed: 0 … 1"):
            plot_trajectories(history, layer)


def test_kept_energy_marks_the_rank_of_every_tolerance():
    spectra, tolerances = spectra_of(2), [0.2, 0.05]
    (axes,) = plot_kept_energy(spectra, tolerances).axes
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
    subprocess.run([sys.executable, "-c", "\n".join(line.strip() for line in check.splitlines())], check=True)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install hf_compressm\[plot\]"):
        plot_spectra([torch.ones(2)])
