"""This package draws pictures of one analysis, of a run, and of many runs; it needs matplotlib.

Every function returns a matplotlib `Figure`, which `save_figure` writes. None uses pyplot, so there is no global state
and no backend. What belongs to layers is given as a dict of layer indices.

`plot_spectra`, `plot_kept_share` and `plot_score_map` show one analysis; `plot_trajectories`, `plot_event_spectra`,
`plot_settling`, `plot_state_sizes` and `plot_loss` show a run; `plot_accuracy` shows many runs.
"""

from .figures import save_figure
from .results import plot_accuracy
from .runs import plot_loss, plot_state_sizes
from .settling import plot_settling
from .spectra import plot_kept_share, plot_score_map, plot_spectra
from .trajectories import plot_event_spectra, plot_trajectories

__all__ = [
    "plot_accuracy",
    "plot_event_spectra",
    "plot_kept_share",
    "plot_loss",
    "plot_score_map",
    "plot_settling",
    "plot_spectra",
    "plot_state_sizes",
    "plot_trajectories",
    "save_figure",
]
