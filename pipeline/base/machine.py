"""Describes this computer and the code's commit; chooses, checks and waits for a device."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """Return what a measured figure depends on: hardware, torch, and the code's commit."""
    return {
        "device": name_hardware(device),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": _read_commit(),
    }


def name_hardware(device: torch.device) -> str:
    """Return a GPU's name, or of the CPU its architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def _read_commit() -> str:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # no git, or no repository: an installed wheel
        return "unknown"
    return found.stdout.strip()


def choose_device(name: str | None) -> torch.device:
    """Return the device of this name; None means cuda where there is one, else cpu.

    Raises:
        ValueError: torch knows no such device.
    """
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or such as cuda:1, got {name!r}") from error


def wait_for_device(device: torch.device) -> None:
    """Return once a device has done all work that is queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_measured(where: str, *, size_px: int, device: torch.device) -> None:
    """Check the side of a view and the device of a benchmark; ``where`` starts the error.

    Raises:
        ValueError: ``size_px`` is no positive multiple of 64, or there is no such device.
    """
    if size_px <= 0 or size_px % 64:
        raise ValueError(f"{where}: size must be a positive multiple of 64 px, got {size_px}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{where}: device must be cpu, cuda or such as cuda:1, got {str(device)!r}"
        )
    num = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= num:
        raise ValueError(f"{where}: device is {str(device)!r}, but torch sees {num} of its kind")
