"""A model in which only some layers have a state: whatever is recorded, told and drawn goes by the layer's index."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import build_model, build_trainer
from safetensors.torch import load_file
from torch import nn

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, install_scan
from hf_compressm.architectures.layers import state_layers, state_sizes
from hf_compressm.architectures.registry import FAMILIES
from hf_compressm.plotting import (
    plot_event_spectra,
    plot_kept_share,
    plot_score_map,
    plot_settling,
    plot_spectra,
    plot_state_sizes,
    plot_trajectories,
)
from hf_compressm.plotting.figures import color_scale
from hf_compressm.storage.checkpoint import check_checkpoint
from hf_compressm.storage.history import History, load_history, save_history
from hf_compressm.training.trigger import Trigger

GAPS = [1, 4]  # the layers that have a state, of five
SIZES = {1: 16, 4: 4}  # at the end of the run
SETTLED = {"trigger": "settled", "start": 0.2, "end": 0.85, "settled_patience": 1, "monitor_steps": 2}
CONFIG = CompreSSMConfig(target_state_size=4, allocation="per_layer", calibration_batches=40, skip_layers=[1])
LAST = "checkpoint-20"


class FeedForward(nn.Module):
    """What stands in a block in place of a mixer with a state; a hybrid has attention there."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states, **kwargs):
        return self.linear(hidden_states)


def build_hybrid():
    model = build_model(num_hidden_layers=5)
    for index in set(range(5)) - set(GAPS):
        model.backbone.layers[index].mixer = FeedForward(model.config.hidden_size)
    assert state_sizes(model) == {1: 16, 4: 16}
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset):
    """(trainer, callback) of a run that cuts layer 4 when its ranking has settled, and leaves layer 1 alone."""
    install_scan()
    callback = CompreSSMCallback(CONFIG, CompreSSMSchedule(**SETTLED))
    folder = tmp_path_factory.mktemp("run")
    trainer = build_trainer(folder, dataset, model=build_hybrid(), save_strategy="steps", save_steps=4)
    callback.attach(trainer)
    trainer.train()
    return trainer, callback


@pytest.fixture
def history(run) -> History:
    return run[1].history


@pytest.fixture
def content(run) -> dict:
    """A copy of the history, in JSON types."""
    return json.loads(json.dumps(run[1].history.to_dict()))


def curves(axes) -> list:
    return [line for line in axes.lines if line.get_linestyle() == "-"]


def named(axes) -> dict[str, object]:
    return {line.get_label(): line for line in axes.lines if line.get_label().startswith("layer")}


def test_a_run_records_the_indices_of_its_layers(run, history):
    (event,) = history.events
    assert event.is_cut and event.layers == GAPS and event.reasons == [None, "settled"]
    assert event.by_layer("state_sizes_after") == state_sizes(run[0].model) == history.state_sizes == SIZES
    assert event.by_layer("reasons") == {1: None, 4: "settled"}
    assert len(history.observations) == 10 and all(seen.layers == GAPS for seen in history.observations)
    assert history.layers == GAPS and history.score_kept.keys() == set(GAPS) and history.score_kept[1] == 1


def test_what_was_not_measured_has_no_layers(history):
    first = history.observations[0]
    assert first.movement is None and first.by_layer("movement") == first.share("movement") == {}
    last = history.observations[-1]
    for layer, position in ((1, 0), (4, 1)):
        largest = float(last.hankel_singular_values[position][0])
        assert last.share("movement")[layer] == pytest.approx(last.movement[position] / largest)


def test_messages_name_the_layers(tmp_path, dataset, capsys, history):
    callback = CompreSSMCallback(replace(CONFIG, skip_layers=[]), CompreSSMSchedule(**SETTLED))
    build_trainer(tmp_path, dataset, [callback], model=build_hybrid(), max_steps=8).train()
    printed = capsys.readouterr().out
    (event,) = callback.history.events
    (seen,) = [each for each in callback.history.observations if each.step == event.step]
    settled = ", ".join(str(layer) for layer, points in seen.by_layer("settled_points").items() if points)
    assert settled in ("1", "4", "1, 4")
    assert f"rankings as at step {seen.compared_with}: layer{'s' * (len(settled) > 1)} {settled}\n" in printed
    whose = {layer: reason for layer, reason in event.by_layer("reasons").items() if reason == "settled"}
    assert f"settled: layer{'s' * (len(whose) > 1)} {', '.join(map(str, whose))}\n" in printed


def test_the_files_name_the_layers(run, history, tmp_path):
    folder = Path(run[0].args.output_dir) / LAST
    loaded, content = load_history(folder), json.loads((folder / "compressm.json").read_text())
    assert loaded.to_dict() == history.to_dict() and loaded.state_sizes == SIZES
    assert all(record["layers"] == GAPS for record in content["events"] + content["observations"])
    spectra = load_file(folder / "hsv.safetensors")
    scored = [i for i, seen in enumerate(history.observations) if seen.scores is not None]
    names = {f"event.0.layer.{layer}" for layer in GAPS}
    names |= {f"observation.{i}.layer.{layer}" for i in range(len(history.observations)) for layer in GAPS}
    assert spectra.keys() == names | {f"observation.{i}.scores.{layer}" for i in scored for layer in GAPS} and scored
    summary = json.loads((folder / "config.json").read_text())["compressm"]
    assert summary["layers"] == GAPS and summary["state_sizes_after"] == [16, 4] and len(summary["score_kept"]) == 2
    save_history(loaded, tmp_path)
    assert load_history(tmp_path).to_dict() == history.to_dict()


def test_a_checkpoint_is_held_against_the_layers_that_have_a_state(run, monkeypatch):
    """Which ones they are a hybrid's family is to say; no family of today has gaps, so one is refused."""
    folder = f"{run[0].args.output_dir}/{LAST}"
    message = r"hold states of the layers \[1, 4\], by config.json the layers \[0, 1, 2, 3, 4\] have a state"
    with pytest.raises(ValueError, match=message):
        check_checkpoint(folder)
    family = type(FAMILIES["compressm_mamba"])
    monkeypatch.setattr(family, "layers_of_config", lambda self, config: list(GAPS))
    assert check_checkpoint(folder) == SIZES
    monkeypatch.setattr(family, "layers_of_config", lambda self, config: [1, 3])
    with pytest.raises(ValueError, match=r"per_layer_config names a layer '4'; allowed: 1, 3"):
        check_checkpoint(folder)


def test_a_model_takes_the_sizes_of_a_history_by_index(history, tmp_path, dataset):
    callback = CompreSSMCallback(CONFIG, CompreSSMSchedule(**SETTLED))
    trainer = build_trainer(tmp_path, dataset, model=build_hybrid())
    callback.attach(trainer)
    trainer._take_sizes_of(history, is_prepared=True)
    assert state_sizes(trainer.model) == SIZES
    others = [replace(record, layers=[0, 1]) for record in history.events]
    with pytest.raises(
        ValueError, match=r"speaks of the layers \[0, 1\], and the layers \[1, 4\] of the model have a"
    ):
        trainer._take_sizes_of(replace(history, events=others), is_prepared=True)


@pytest.mark.parametrize(
    "layers", [[1], [1, 4, 5], [4, 1], [-1, 4], [4, 4], [1, 4.0], [False, 4], [1, "4"], [], {}, 5]
)
@pytest.mark.parametrize("kind", ["events", "observations"])
def test_layers_that_cannot_be_are_refused(content, kind, layers):
    History.from_dict(content)
    content[kind][0]["layers"] = layers
    with pytest.raises(ValueError, match="malformed history"):
        History.from_dict(content)


def test_records_that_do_not_say_their_layers_are_refused(content):
    del content["observations"][3]["layers"]
    with pytest.raises(ValueError, match="malformed history.*layers"):
        History.from_dict(content)


def test_records_of_different_layers_are_no_history(content):
    content["observations"][3]["layers"] = [1, 3]
    with pytest.raises(ValueError, match=r"malformed history.*layers \[1, 3\] beside one of \[1, 4\]"):
        History.from_dict(content)


def test_the_trajectory_is_that_of_the_layer(history):
    for layer, position in ((None, 0), (1, 0), (4, 1)):
        above, below = plot_trajectories(history, layer).axes[:2]
        spectra = {
            seen.step: seen.hankel_singular_values[position] for seen in [*history.observations, *history.events]
        }
        first = curves(above)[0]
        assert list(first.get_ydata()) == [float(spectra[step][0]) for step in sorted(spectra)]
        assert [text.get_text() for text in above.texts] == ([] if position == 0 else ["N 16 → 4"])
        (moved,) = curves(below)
        assert moved.get_ydata()[-1] == pytest.approx(
            100 * list(history.observations[-1].share("movement").values())[position]
        )
    for layer in (0, 2, 5):
        with pytest.raises(ValueError, match=f"layer = {layer}; allowed: 1, 4."):
            plot_trajectories(history, layer)


def test_settling_has_a_panel_for_each_layer_with_a_state(history):
    panels = [axes for axes in plot_settling(history).axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["layer 1", "layer 4"]
    assert [[text.get_text() for text in axes.texts] for axes in panels] == [[], ["settled"]]
    seen = [each for each in history.observations if each.rank_noise is not None]
    for position, axes in enumerate(panels):
        assert list(axes.lines[0].get_ydata()) == [each.rank_noise[position] for each in seen]
    above, below = plot_settling(history, layer=4).axes
    assert above.get_title(loc="left") == "layer 4"
    distances = [each.share_distance[1] for each in seen if each.share_distance is not None]
    assert [y for y in below.lines[1].get_ydata() if not math.isnan(y)] == distances
    with pytest.raises(ValueError, match="layer = 0; allowed: 1, 4, or None for all"):
        plot_settling(history, layer=0)


def test_sizes_are_drawn_under_the_names_of_their_layers(history):
    lines = named(plot_state_sizes(history).axes[0])
    assert lines.keys() == {"layer 1", "layer 4"}
    assert set(lines["layer 1"].get_ydata()) == {16} and set(lines["layer 4"].get_ydata()) == {16, 4}
    colors = color_scale(1, 4)
    assert [line.get_color() for line in lines.values()] == [colors.to_rgba(layer) for layer in GAPS]


def test_spectra_are_drawn_under_the_names_of_their_layers(history):
    spectra = history.events[0].by_layer("hankel_singular_values")
    for draw in (plot_spectra, plot_kept_share):
        (axes,) = draw(spectra).axes
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["layer 1", "layer 4"]
    scores = next(seen for seen in history.observations if seen.scores is not None).by_layer("scores")
    axes = plot_score_map(scores, SIZES).axes[0]
    assert [axes.yaxis.get_major_formatter()(row) for row in range(3)] == ["1", "4", ""]
    assert list(axes.lines[0].get_xdata()) == [16.5, 16.5, 4.5, 4.5]
    (title,) = [axes.get_title(loc="left") for axes in plot_event_spectra(history).axes]
    assert title == f"step {history.events[0].step}\nmean N 16 → 10"


def test_the_trigger_waits_for_layers_by_their_index(history):
    """Layer 4 was settled and cut; of layer 1, whose position is 0, as of layer 4 no position may be taken for it."""
    layers, config = state_layers(build_hybrid()), replace(CONFIG, skip_layers=[])
    trigger = Trigger(CompreSSMSchedule(**SETTLED), config, 20)
    seen = [replace(each, settled_points=[0, 1]) if each.settled_points else each for each in history.observations]
    step = history.events[0].step
    due = trigger.due(layers, replace(history, events=[], observations=seen), step)
    assert due.reasons == {4: "settled"} and due.config.skip_layers == [1]
    assert due.reasons_of(GAPS) == [None, "settled"]
    assert trigger.due(layers, replace(history, observations=seen), 16) is None
    due = trigger.due(layers, replace(history, observations=seen), 17)
    assert due.reasons == {1: "window ended"} and due.config.skip_layers == [4]
