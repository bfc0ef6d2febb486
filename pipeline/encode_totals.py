"""An encode run's outcomes added up: what its progress shows and what is said at its end."""

from collections import Counter
from dataclasses import dataclass, field

from pipeline.encode import Outcome

MAX_LISTED = 20  # failed tasks named at the end; all are in metrics.jsonl's counts and the log


@dataclass
class EncodeTotals:
    """A run's outcomes added up."""

    tasks: Counter[str] = field(default_factory=Counter)  # by status
    rejects: Counter[str] = field(default_factory=Counter)  # by reason
    num_pairs: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    failures: dict[str, str] = field(default_factory=dict)  # task -> reason
    stopped: bool = False  # before its end, for too many failed

    def add(self, outcome: Outcome) -> None:
        """Count one more outcome."""
        self.tasks[outcome.status] += 1
        self.rejects.update(outcome.rejects)
        self.num_bytes += outcome.num_bytes
        if outcome.status == "failed":
            self.failures[outcome.task] = outcome.error
        else:
            self.num_pairs += outcome.num_pairs
            self.num_samples += outcome.num_samples

    @property
    def num_rejects(self) -> int:
        """Rejected samples, members and pairs."""
        return sum(self.rejects.values())

    def figures(self) -> dict[str, int]:
        """Return what progress shows."""
        return {
            "pairs": self.num_pairs,
            "MB": round(self.num_bytes / 1e6),
            "rejects": self.num_rejects,
            "failed": len(self.failures),
        }

    def describe(self) -> str:
        """Say what was stored, what was rejected and why, and which tasks failed."""
        lines = [
            f"stored {self.num_samples} samples, {self.num_pairs} pairs, "
            f"{self.num_bytes / 1e6:.1f} MB in {self.tasks['committed']} tasks"
        ]
        if self.tasks["lost"]:
            lines.append(f"{self.tasks['lost']} tasks were committed by another run first")
        for reason, count in self.rejects.most_common():
            lines.append(f"rejected {count}: {reason}")
        for task, reason in sorted(self.failures.items())[:MAX_LISTED]:
            lines.append(f"failed {task}: {reason}")
        if self.stopped:
            lines.append("stopped: too many tasks failed (--max-failures); mend their cause first")
        if self.failures:
            lines.append(f"tasks failed: {len(self.failures)}; the same command tries them again")
        return "\n".join(lines)
