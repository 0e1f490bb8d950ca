"""The guard between iterations: signs of drift, held against thresholds that warn or stop. Pure functions.

length_gap            (mean tokens of chosen - of rejected) / of rejected, over the iteration's own kept pairs
tie_rate              share of ranked prompts whose candidates the ranker found all alike
truncation_rate       share of candidates that were cut off at the longest response
duplicate_rate        share of candidates that repeat another one of their prompt
share_kept            share of prompts that gave a pair which passed the filters
reference_agreement   share of pairs whose chosen response the reference finds likelier, known when training starts
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from aipo_hpc.errors import GuardStop, RecipeError
from aipo_hpc.rows import Pair, Ranked

BELOW = ("share_kept", "reference_agreement")
"""Values of which little is a bad sign; of the others much is."""

VALUE = "guard_"
"""How the counts of a job begin that are the guard's values."""

ADVICE: Mapping[str, str] = {
    "length_gap": "raise train.alpha, or choose pairs with pairs.length_rule=penalized",
    "tie_rate": "sample at a higher generate.temperature, or take another ranker",
    "truncation_rate": "raise generate.max_tokens, or drop cut responses with pairs.drop_truncated_chosen",
    "duplicate_rate": "sample at a higher generate.temperature",
    "share_kept": "loosen the filters (pairs.*) that the counts of dropped prompts name",
    "reference_agreement": "compare ranker and reference: the pairs ask for what the policy finds unlikely",
}


@dataclass(frozen=True)
class GuardConfig:
    """Thresholds of the guard (None: none). A value beyond ``stop`` ends the run before more is spent on it."""

    warn_length_gap: float | None = 0.5
    """Chosen responses are longer than rejected ones by more than this share."""
    stop_length_gap: float | None = None
    """The same, and the run stops."""
    warn_tie_rate: float | None = 0.5
    """More than this share of prompts has candidates that are all alike to the ranker."""
    stop_tie_rate: float | None = None
    """The same, and the run stops."""
    warn_truncation_rate: float | None = 0.25
    """More than this share of candidates was cut off."""
    stop_truncation_rate: float | None = None
    """The same, and the run stops."""
    warn_duplicate_rate: float | None = 0.5
    """More than this share of candidates repeats another one of its prompt."""
    stop_duplicate_rate: float | None = None
    """The same, and the run stops."""
    warn_share_kept: float | None = 0.25
    """Less than this share of prompts gave a pair."""
    stop_share_kept: float | None = None
    """The same, and the run stops."""
    warn_reference_agreement: float | None = 0.25
    """In less than this share of pairs the reference finds the chosen response likelier."""
    stop_reference_agreement: float | None = None
    """The same, and the run stops."""

    def __post_init__(self) -> None:
        for name in ADVICE:
            warn, stop = getattr(self, f"warn_{name}"), getattr(self, f"stop_{name}")
            if warn is not None and stop is not None and (stop > warn if name in BELOW else stop < warn):
                raise RecipeError(
                    f"guard.stop_{name}={stop} comes before guard.warn_{name}={warn}: it must be "
                    f"{'lower' if name in BELOW else 'higher'}, or one of them None."
                )


@dataclass(frozen=True)
class Finding:
    """A value beyond a threshold."""

    name: str
    value: float
    threshold: float
    stops: bool

    def __str__(self) -> str:
        word, side = ("stop" if self.stops else "warn"), ("below" if self.name in BELOW else "above")
        return f"{self.name} {self.value:.3f} is {side} guard.{word}_{self.name}={self.threshold:g}"


def check(values: Mapping[str, float], config: GuardConfig) -> list[Finding]:
    """What is beyond a threshold, in the order of the values; one finding each, the graver one."""
    findings = []
    for name, value in values.items():
        for word in ("stop", "warn"):
            threshold = getattr(config, f"{word}_{name}")
            if threshold is not None and (value < threshold if name in BELOW else value > threshold):
                findings.append(Finding(name, value, threshold, word == "stop"))
                break
    return findings


def enforce(findings: Sequence[Finding], job: str) -> None:
    """Raise GuardStop if any finding stops the run."""
    stops = [finding for finding in findings if finding.stops]
    if stops:
        advice = "; ".join(dict.fromkeys(ADVICE[finding.name] for finding in stops))
        raise GuardStop(
            f"{job}: the guard stopped the run: {'; '.join(map(str, stops))}. To go on as it is, change the threshold "
            f"({' '.join(f'guard.stop_{finding.name}=...' for finding in stops)}) and type the same command again. To mend "
            f"it: {advice}; in a new run directory, or after a reset of the first job whose settings that changes."
        )


@dataclass
class Tally:
    """What is counted of all prompts while pairs are made."""

    prompts: int = 0
    ranked: int = 0
    candidates: int = 0
    truncated: int = 0
    repeated: int = 0

    def add(self, row: Ranked) -> None:
        """Count a prompt."""
        self.prompts += 1
        self.ranked += row.error is None
        self.candidates += len(row.candidates)
        self.truncated += sum(candidate.finish_reason == "length" for candidate in row.candidates)
        self.repeated += len(row.candidates) - len({candidate.response for candidate in row.candidates})

    def values(self, own: Sequence[Pair], ties: int) -> dict[str, float]:
        """The guard's values, with the pairs of these prompts that are kept (at least one) and the number of ties."""
        chosen, rejected = (fmean(getattr(pair, side).num_tokens for pair in own) for side in ("chosen", "rejected"))
        return {
            "length_gap": (chosen - rejected) / max(1.0, rejected),
            "tie_rate": ties / max(1, self.ranked),
            "truncation_rate": self.truncated / max(1, self.candidates),
            "duplicate_rate": self.repeated / max(1, self.candidates),
            "share_kept": len(own) / max(1, self.prompts),
        }


def agreement(chosen_logps: Sequence[float], rejected_logps: Sequence[float]) -> float:
    """The share of pairs whose chosen response is the likelier one; equal ones count half."""
    both = zip(chosen_logps, rejected_logps, strict=True)
    return fmean(0.5 if chosen == rejected else float(chosen > rejected) for chosen, rejected in both)
