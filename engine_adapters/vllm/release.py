"""When a request may begin to compute on KV of which some layers are still on their way."""

from __future__ import annotations

from dataclasses import dataclass

# Of a guess: both speeds vary, and waiting within a step makes every request of the batch wait.
_MARGIN = 1.25
_SMOOTHING = 0.3
# Steps with fewer tokens are bound by weights, and say nothing of a prefill.
_TOKENS_MIN = 32


@dataclass(frozen=True)
class LoadProgress:
    """How far a load is: `layers_ready` of `layers`, `elapsed_s` after it began."""

    layers_ready: int
    layers: int
    elapsed_s: float


def keeps_ahead(progress: LoadProgress, compute_s: float) -> bool:
    """Whether each layer that is missing is expected before a step that takes `compute_s` reaches it.

    Layers are taken to arrive as they did so far, and to be computed at an even pace.
    """
    if progress.layers_ready >= progress.layers:
        return True
    if progress.layers_ready == 0:
        return False
    layer_load_s = _MARGIN * progress.elapsed_s / progress.layers_ready
    layer_compute_s = compute_s / progress.layers
    missing = progress.layers - progress.layers_ready
    # Both are straight lines, so the ends decide: the next layer and the last.
    return (
        layer_load_s <= progress.layers_ready * layer_compute_s
        and missing * layer_load_s <= (progress.layers - 1) * layer_compute_s
    )


class ComputeSpeed:
    """What a token of a prefill takes, learned from steps."""

    def __init__(self) -> None:
        self._token_s: float | None = None

    def note(self, tokens: int, step_s: float) -> None:
        """A step has computed `tokens` in `step_s`, without waiting for KV."""
        if tokens < _TOKENS_MIN:
            return
        token_s = step_s / tokens
        known = self._token_s
        self._token_s = token_s if known is None else known + _SMOOTHING * (token_s - known)

    def expected_s(self, tokens: int) -> float:
        """How long a step of so many tokens takes, at least; 0 while nothing is known."""
        return (self._token_s or 0.0) * tokens
