"""metrics.jsonl: the logged steps of a training, one line each, whole after any number of interruptions."""

import json
import math
from pathlib import Path

from transformers import Trainer

from aipo_hpc.errors import RecipeError

METRICS = "metrics.jsonl"


class MetricsFile(Trainer):
    """A Trainer that writes the steps it logs to ``metrics_path``, and stops when one of them is no number."""

    metrics_path: Path
    _metrics_started = False

    def complete(self, logs: dict[str, float]) -> None:
        """Add to what Trainer logs about a step; called on all processes."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step and append it to the file. Raises RecipeError when loss or gradient is not a finite number."""
        is_step = "loss" in logs
        if is_step:
            self.complete(logs)
        super().log(logs, start_time)
        if (epoch := self.epochs_done()) is not None:
            self.state.log_history[-1]["epoch"] = epoch
        if not is_step:
            return
        self._append_metrics()
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise RecipeError(
                    f"{name} is {logs[name]} at step {self.state.global_step}: lower the learning rate (or beta), "
                    f"or look for the first odd line in {self.metrics_path}."
                )

    def epochs_done(self) -> float | None:
        """Passes over the data so far, where Trainer does not know it."""
        return None

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The logged steps since the start of training, those before an interruption included."""
        return [line for line in self.state.log_history if "loss" in line]

    def _append_metrics(self) -> None:
        """The first call of an attempt writes what earlier attempts had logged, too."""
        if not self.is_world_process_zero():
            return
        lines = self.metrics[-1:] if self._metrics_started else self.metrics
        with self.metrics_path.open("a" if self._metrics_started else "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        self._metrics_started = True

    def write_metrics(self) -> None:
        """Write the whole file."""
        self._metrics_started = False
        with self.metrics_path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.metrics)
