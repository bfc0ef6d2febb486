"""Raw weights and optimizer state, to resume from.

They are one flat mapping of tensors, as in a safetensors file: ``weights/<name>`` and
``optimizer/<key>/<name>``, where a name is that of the model's parameter or buffer.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def collect_training(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return a model's raw weights and its optimizer's state; the tensors are not copied."""
    tensors: dict[str, Tensor] = {
        f"weights/{name}": value for name, value in model.state_dict().items()
    }
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
    return tensors


def restore_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Load what ``collect_training`` returned into a model and its optimizer."""
    weights: dict[str, Tensor] = {}
    states: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "weights":
            weights[rest] = value
        else:
            key, _, parameter_name = rest.partition("/")
            states[parameter_name][key] = value
    model.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        if name in states:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in states[name].items()
            }


def count_checkpoint_bytes(model: nn.Module) -> int:
    """Return the bytes of a checkpoint: raw and averaged weights, and AdamW's two moments."""
    trained = (value for value in model.parameters() if value.requires_grad)
    return 2 * sum(value.nbytes for value in (*model.state_dict().values(), *trained))
