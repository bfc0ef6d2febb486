"""This computer: its processors and devices, the commit that runs, waiting for a device."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """Return what a figure depends on besides the code, and the code's commit where git knows."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": _read_commit(),
    }


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
    """Return the device of this name; None is cuda where there is one, else cpu.

    Raises:
        ValueError: torch knows no such device.
    """
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or such as cuda:1, got {name!r}") from error


def wait_for_device(device: torch.device) -> None:
    """Return once a device has done all that it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_measured(where: str, *, size_px: int, device: torch.device) -> None:
    """Refuse a view's side or a device that a benchmark cannot be run at; ``where`` names it.

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
