"""These pictures lie beside a reduced model: what was cut, when, and what became of the loss."""

from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from ..plotting import plot_event_spectra, plot_loss, plot_settling, plot_state_sizes, save_figure
from ..storage.history import History

logger = logging.get_logger(__name__)

PICTURES = ("spectra.png", "state_sizes.png", "loss.png", "settling.png")


def write_pictures(folder: str | Path, history: History, log_history: Sequence[dict] = ()) -> None:
    """Write those of `PICTURES` that have something to show; without matplotlib warn and write none.

    Args:
        log_history: the log of the Trainer, if one trained the model.
    """
    folder, log_history = Path(folder), list(log_history)
    in_training = any(event.step is not None for event in history.events)
    recorded = [*history.events, *history.observations]
    last_step = max((entry["step"] for entry in log_history), default=0)
    last_step = max([last_step, *(record.step for record in recorded if record.step is not None)])
    has_losses = any(name in entry for entry in log_history for name in ("loss", "eval_loss"))
    has_rankings = any(seen.rank_noise is not None for seen in history.observations)
    drawings = {
        "spectra.png": lambda: plot_event_spectra(history) if history.events else None,
        "state_sizes.png": lambda: plot_state_sizes(history, last_step) if in_training else None,
        "loss.png": lambda: plot_loss(log_history, history) if has_losses else None,
        "settling.png": lambda: plot_settling(history) if has_rankings else None,
    }
    try:
        figures = {name: draw() for name, draw in drawings.items()}
    except ImportError as error:
        logger.warning(f"No pictures were written beside the model: {error}")
        return
    for name, figure in figures.items():
        if figure is not None:
            save_figure(figure, folder / name)
