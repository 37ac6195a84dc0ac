"""Whether this machine can run the kernels, and what to do where it cannot."""

from __future__ import annotations

import importlib.util
import os

import torch

from penstock.errors import ConfigError


def is_interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, slowly, for tests (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def kernel_device(device: str | torch.device) -> torch.device:
    """The device that kernels run on.

    Args:
      device: `cuda` or `cuda:n`; in Triton's interpreter also `cpu`, which is what `cuda` means
        there where there is no GPU.

    Raises:
      ConfigError: no Triton, or no such GPU.
    """
    found = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            f"device {str(device)!r} needs Triton, which is not installed; "
            "pip install 'penstock[gpu]', or set device to cpu"
        )
    if is_interpreted() and (found.type == "cpu" or not torch.cuda.is_available()):
        return torch.device("cpu")
    if found.type != "cuda":
        raise ConfigError(f"device {str(device)!r}: embeddings live on cpu or cuda")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device {str(device)!r}: torch {torch.__version__} finds no CUDA GPU on this machine; "
            "set device to cpu, or install a driver and a torch for it"
        )
    number = torch.cuda.current_device() if found.index is None else found.index
    if number >= torch.cuda.device_count():
        raise ConfigError(
            f"device {str(device)!r}: this machine has {torch.cuda.device_count()} GPUs, "
            "numbered from 0"
        )
    return torch.device("cuda", number)
