"""What a training goes on from, beside what its loop counts: raw weights and optimizer state.

In a file they are ``weights/<name>`` and ``optimizer/<key>/<name>``, names as the model has them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingState:
    """Tensors by name: the raw weights, and the optimizer's state a parameter."""

    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]

    def flatten(self) -> dict[str, Tensor]:
        """Return the tensors by their names in a file."""
        flat = {f"weights/{name}": value for name, value in self.weights.items()}
        for name, state in self.optimizer.items():
            flat |= {f"optimizer/{key}/{name}": value for key, value in state.items()}
        return flat


def collect_training(model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Return a model's raw weights and its optimizer's state by parameter name."""
    states = {
        name: {key: torch.as_tensor(value) for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }
    return TrainingState(dict(model.state_dict()), states)


def read_training(path: Path) -> TrainingState:
    """Read a file of flattened tensors, onto the CPU."""
    weights: dict[str, Tensor] = {}
    optimizer: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(path).items():
        kind, _, rest = name.partition("/")
        if kind == "weights":
            weights[rest] = value
        else:
            key, _, parameter = rest.partition("/")
            optimizer.setdefault(parameter, {})[key] = value
    return TrainingState(weights, optimizer)


def restore_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, training: TrainingState
) -> None:
    """Put a saved state back into a model and its optimizer."""
    model.load_state_dict(training.weights)
    for name, parameter in model.named_parameters():
        if name in training.optimizer:
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if key != "step" else value
                for key, value in training.optimizer[name].items()
            }
