"""Pictures of the singular values, of a run, and of results: they need matplotlib.

Every function returns a matplotlib `Figure`, which `save_figure` writes. No pyplot: no global state, no backend.

One analysis: `plot_spectra`, `plot_kept_share`, `plot_score_map`. A run: `plot_trajectories`, `plot_event_spectra`,
`plot_settling`, `plot_state_sizes`, `plot_loss`. Many runs: `plot_accuracy`.
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
