"""The monitor watches the singular values: how far they moved, and how far Weyl's theorem allowed them to.

For the trigger "settled" it watches the scores by which states are ranked as well, and what noise is in them.
"""

import time
from collections.abc import Iterable

from torch import Tensor

from ..analysis.calibration import undisturbed
from ..analysis.checks import split_batches
from ..analysis.objective import Loss, Objective
from ..analysis.states import StateAnalysis, analyze_states
from ..architectures import StateLayers
from ..architectures.installed_scan import scan_installed
from ..config import CompreSSMConfig
from ..engines import from_first_process
from ..storage.records import Observation
from ..theory.rankings import compare_rankings
from ..theory.scalar_decay import layer_weyl_bound


class StateMonitor:
    """A monitor observes singular values, beside those before if the sizes are the same; the model is not disturbed.

    Args:
        last: the observation that the first one is compared with, in a run that goes on. Weyl's bound needs the
            Gramians of both, so it begins with the second.
    """

    def __init__(self, last: Observation | None = None):
        self._last = last
        self._last_gramians: dict[int, tuple[Tensor, Tensor]] | None = None

    def observe(
        self,
        layers: StateLayers,
        batches: Iterable[dict] | None,
        config: CompreSSMConfig,
        step: int,
        draws: int = 0,
        loss: Loss | None = None,
    ) -> Observation:
        """Measure the spectrum of every layer, and where it is asked for the scores.

        Args:
            batches: as for `analyze`; an LRU needs none.
            config: what to measure with: the criterion, and the number of calibration batches.
            step: the number of optimizer steps done.
            draws: the number of disjoint draws to take the scores of: 0, 1 to compare later ones with, or 2 for the
                noise. The second draw is that on which `analyze` measures losses.
            loss: as for `analyze`.
        """
        started = time.perf_counter()
        objective = Objective(layers.model, loss)
        statistics_batches, _, other_batches = split_batches(layers, batches, config)
        with undisturbed(layers.model), scan_installed():
            analysis = analyze_states(layers, statistics_batches, config, objective)
            spectra = [spectrum.cpu() for spectrum in analysis.hankel_singular_values().values()]
            gramians = analysis.gramians
            scores = _shared_scores(analysis) if draws else None
            other = _shared_scores(analyze_states(layers, other_batches, config, objective)) if draws == 2 else None
        noise = list(map(compare_rankings, scores, other)) if other is not None else None
        sizes = layers.sizes
        comparable = self._last is not None and self._last.by_layer("state_sizes") == sizes
        observation = Observation(
            step=step,
            layers=list(sizes),
            state_sizes=list(sizes.values()),
            movement=self._movement(spectra) if comparable else None,
            weyl_bound=self._weyl_bounds(gramians) if comparable and gramians and self._last_gramians else None,
            seconds=time.perf_counter() - started,
            hankel_singular_values=spectra,
            scores=scores,
            rank_noise=None if noise is None else [each.correlation for each in noise],
            share_noise=None if noise is None else [each.distance for each in noise],
        )
        self._last, self._last_gramians = observation, gramians
        return observation

    def _movement(self, spectra: list[Tensor]) -> list[float]:
        before = self._last.hankel_singular_values
        return [float((now - then).abs().max()) for now, then in zip(spectra, before, strict=True)]

    def _weyl_bounds(self, gramians: dict[int, tuple[Tensor, Tensor]]) -> list[float]:
        return [float(layer_weyl_bound(*self._last_gramians[index], *now)) for index, now in gramians.items()]


def _shared_scores(analysis: StateAnalysis) -> list[Tensor]:
    """Return the scores of each layer, (N,), on the CPU, the same in all processes, which decide by them."""
    return from_first_process([score.cpu() for score in analysis.scores.values()])
