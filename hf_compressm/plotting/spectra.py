"""These pictures show one analysis: spectra and scores, layer by layer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..theory.criteria import scores_by_rank
from ..theory.hankel import truncation_rank
from .figures import (
    AUXILIARY,
    FLOOR,
    SMALL,
    color_bar,
    color_scale,
    load_matplotlib,
    new_figure,
    tell_layers_apart,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Spectra = dict[int, Tensor]  # layer index → spectrum, (N,), descending
SMALLEST_SHARE = 1e-4  # %, in the map of scores
ERROR_LABEL = r"$\Sigma_{i>r}\,\sigma_i^2\,/\,\Sigma\,\sigma_i^2$"


def plot_spectra(spectra: Spectra, with_error: bool = False) -> "Figure":
    """Draw the Hankel singular values of every layer, σ_i / σ_1 on a logarithmic axis, from 1e-10 on.

    With the error a second axis shows, dashed, the squared output error that is predicted where r balanced states are
    kept, Σ_{i>r} σ_i², as a share of Σ σ_i².

    Args:
        spectra: layer index → spectrum, (N,), descending, as in `StateReport.hankel_singular_values` or from
            `record.by_layer("hankel_singular_values")` of an event or an observation.
        with_error: whether σ_i predict the error, as where a report or an event has a `predicted_error`.
    """
    spectra, (figure, axes) = _by_layer(spectra), new_figure()
    lines = _draw_layers(axes, {i: shares_of_largest(sigma) for i, sigma in spectra.items()})
    if with_error:
        errors = add_error_axis(axes)
        errors.set_ylabel(f"squared error predicted {ERROR_LABEL} (dashed)")
        for line, sigma in zip(lines, spectra.values(), strict=True):
            draw_error(errors, error_shares(sigma), line.get_color())
    axes.set(yscale="log", xlabel="rank $i$", ylabel=r"Hankel singular value $\sigma_i\,/\,\sigma_1$")
    return figure


def plot_kept_share(spectra: Spectra, tolerances: Sequence[float] = (0.1, 0.05, 0.01)) -> "Figure":
    """Draw the share of Σσ that the first r singular values hold, in %, with a dot at the rank for each tolerance τ.

    Args:
        spectra: as for `plot_spectra`.
        tolerances: shares that may be discarded, in (0, 1). The axis begins at five times the largest below 100 %.
    """
    spectra, (figure, axes) = _by_layer(spectra), new_figure()
    kept = {i: 100 * sigma.cumsum(0) / sigma.sum().clamp_min(1e-300) for i, sigma in spectra.items()}
    for line, (i, sigma) in zip(_draw_layers(axes, kept), spectra.items(), strict=True):
        ranks = [truncation_rank(sigma, tolerance, min_reduction=0) for tolerance in tolerances]
        shares = [kept[i][rank - 1] for rank in ranks]
        axes.plot(ranks, shares, "o", color=line.get_color(), markersize=5.5, markeredgecolor="white")
    for tolerance in tolerances:
        share = 100 * (1 - tolerance)
        axes.axhline(share, **AUXILIARY)
        text = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": SMALL}
        axes.annotate(rf"$\tau$ = {tolerance:g}", (1, share), xytext=(3, 0), va="center", **text)
    axes.set(xlabel="rank $r$", ylabel=r"share of $\Sigma\sigma$ kept (%)")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 100 * (1 - 5 * max(tolerances, default=1))))
    return figure


def plot_score_map(scores: Spectra, state_sizes: dict[int, int] | None = None) -> "Figure":
    """Draw each state's share of its layer's score, in %, as a map over depth and rank.

    Colours are logarithmic, from 1e-4 % on.

    Args:
        scores: layer index → score of each state, (N,), in any order, as in `StateReport.scores`. Spectra will do as
            well. Of groups, (G, N), those of equal rank are added up. Beyond a layer's N the map is hatched.
        state_sizes: layer index → states kept, as in `StateReport.state_sizes`. A line is drawn to the right of them.

    Raises:
        ValueError: there are no scores, some are negative or not finite, or the sizes do not fit them.
    """
    scores = _by_layer(scores)
    _check_scores(scores)
    scores = {index: scores_by_rank(score) for index, score in scores.items()}
    if state_sizes is not None:
        _check_state_sizes(state_sizes, scores)
    figure, axes = new_figure(height=min(max(1.8 + 0.13 * len(scores), 2.4), 7))
    _draw_map(axes, scores)
    if state_sizes is not None:
        _draw_kept(axes, [state_sizes[index] for index in scores])
    axes.set(xlabel="state, by rank $i$", ylabel="layer")
    return figure


def error_shares(sigma: Tensor) -> Tensor:
    """Return Σ_{i>r} σ_i² / Σ σ_i² for r = 1 … N - 1, (N - 1,), where what is below 1e-10 is set to that."""
    left = sigma.square().flip(0).cumsum(0).flip(0)  # from each rank on
    return (left[1:] / left[0].clamp_min(1e-300)).clamp_min(FLOOR)


def add_error_axis(axes: "Axes") -> "Axes":
    """Return axes with the same ranks, whose logarithmic scale at the right is for predicted errors."""
    errors = axes.twinx()
    errors.spines[["top", "left", "bottom"]].set_visible(False)
    errors.set_yscale("log")
    return errors


def draw_error(axes: "Axes", shares: Tensor, color) -> None:
    """Draw the predicted error of r = 1 … N - 1 states."""
    style = {"marker": "." if len(shares) == 1 else "", "label": "squared error predicted"}
    axes.plot(range(1, len(shares) + 1), shares, color=color, linestyle="--", linewidth=0.9, **style)


def shares_of_largest(sigma: Tensor) -> Tensor:
    """Return σ_i / σ_1, (N,), where what is below 1e-10 is set to that."""
    return (sigma / sigma[0].clamp_min(1e-300)).clamp_min(FLOOR)


def _by_layer(spectra: Spectra) -> dict[int, Tensor]:
    """Return spectra by layer index, (N,), float64 on the CPU.

    Raises:
        ValueError: there are none, or they do not say their layers.
    """
    if not isinstance(spectra, dict):
        raise ValueError(
            f"spectra were given as a {type(spectra).__name__}, which says no layers; give a dict of layer indices, "
            'such as a report\'s or record.by_layer("hankel_singular_values").'
        )
    if not spectra:
        raise ValueError("there are no spectra to plot.")
    return {index: sigma.detach().to("cpu", torch.float64) for index, sigma in spectra.items()}


def _draw_layers(axes: "Axes", curves: dict[int, Tensor]) -> list:
    """Draw a line for each layer over the ranks 1 … N, coloured along depth, and say which line is which."""
    colors = color_scale(min(curves), max(curves))
    for index, curve in curves.items():
        style = {"color": colors.to_rgba(index), "marker": "." if len(curve) <= 16 else ""}
        axes.plot(range(1, len(curve) + 1), curve, linewidth=1.3, label=f"layer {index}", **style)
    tell_layers_apart(axes, colors, len(curves))
    return list(axes.lines)


def _check_scores(scores: dict[int, Tensor]) -> None:
    for index, score in scores.items():
        wrong = int((~(score.isfinite() & (score >= 0))).sum())
        if score.ndim not in (1, 2) or score.numel() == 0 or wrong:
            raise ValueError(
                f"the scores of layer {index} have the shape {tuple(score.shape)}, {wrong} of them are negative, "
                "NaN or infinite; give (N,) finite numbers ≥ 0 for each layer, or (G, N) of groups."
            )


def _check_state_sizes(state_sizes: dict[int, int], scores: dict[int, Tensor]) -> None:
    limits = {index: len(score) for index, score in scores.items()}
    if not isinstance(state_sizes, dict) or state_sizes.keys() != limits.keys():
        raise ValueError(
            f"state_sizes = {state_sizes}, and there are scores of the layers {list(limits)}; give a dict with a size "
            "for each of them."
        )
    for index, size in state_sizes.items():
        if not 0 <= size <= limits[index]:
            raise ValueError(f"state_sizes[{index}] = {size}; allowed: 0 … {limits[index]}, the states it has.")


def _draw_map(axes: "Axes", scores: dict[int, Tensor]) -> None:
    """Draw a row for each layer, the first on top, and the colour bar; scores are descending."""
    mpl, layers = load_matplotlib(), list(scores)
    shares = [100 * score / score.sum().clamp_min(1e-300) for score in scores.values()]
    table = pad_sequence(shares, batch_first=True, padding_value=torch.nan)  # (layers, N), NaN where there is no state
    given = torch.cat(shares)
    largest = float(given.max()) or 100.0
    smallest = min(max(float(given.min()), SMALLEST_SHARE), largest / 10)
    axes.patch.set(facecolor="0.93", edgecolor="0.7", hatch="//////")
    image = axes.imshow(
        table.clamp_min(smallest).numpy(),
        cmap="viridis",
        norm=mpl.colors.LogNorm(smallest, largest),
        extent=(0.5, table.shape[1] + 0.5, len(layers) - 0.5, -0.5),
        aspect="auto",
        interpolation="nearest",
    )
    axes.yaxis.set_major_locator(whole_numbers())
    axes.yaxis.set_major_formatter(lambda row, _: str(layers[int(row)]) if 0 <= row < len(layers) else "")
    extend = "min" if float(given.min()) < smallest else "neither"
    ticks = mpl.ticker.LogLocator(subs=[1] if largest > 100 * smallest else [1, 2, 5])
    color_bar(axes, image, "share of score (%)", ticks=ticks, format="%g", extend=extend)


def _draw_kept(axes: "Axes", state_sizes: list[int]) -> None:
    """Draw a line down the rows, to the right of the states kept; white within black shows on every colour."""
    mpl = load_matplotlib()
    borders = [size + 0.5 for size in state_sizes for _ in range(2)]
    rows = [row + side for row in range(len(state_sizes)) for side in (-0.5, 0.5)]
    casing = [mpl.patheffects.Stroke(linewidth=3.2, foreground="black"), mpl.patheffects.Normal()]
    style = {"color": "white", "linewidth": 1.6, "path_effects": casing, "clip_on": False, "solid_capstyle": "butt"}
    axes.plot(borders, rows, label="kept: what lies left of the line", **style)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, fontsize=SMALL)
