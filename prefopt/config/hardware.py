"""Device and precision: which ones this machine has, and what "auto" means on it."""

from typing import Protocol

from prefopt.errors import UserError
from prefopt.utils.distributed import world_size


class Hardware(Protocol):
    """A config with device and precision, which may be "auto" until `resolve_hardware`."""

    device: str
    precision: str


def check_hardware(config: Hardware) -> None:
    """Raise UserError for a device that this machine does not have, or an unknown precision."""
    if problems := hardware_problems(config):
        raise UserError("\n".join(problems))


def resolve_hardware(config: Hardware) -> None:
    """Replace device=auto and precision=auto by their values on this machine. Changes `config`, so records name them.

    bfloat16 is chosen where the hardware multiplies it natively: emulated, it is many times slower than float32.
    """
    import torch

    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.precision == "auto":
        if config.device.startswith("cuda"):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        config.precision = "bfloat16" if native else "float32"


def micro_batch_tokens(device: str) -> int:
    """The default of micro_batch_tokens: a CPU gains nothing from more than 1024 tokens at a time, a GPU does."""
    return 8192 if device.startswith("cuda") else 1024


def hardware_problems(config: Hardware) -> list[str]:
    """What `check_hardware` would refuse, a line for each problem."""
    import torch

    problems = []
    if config.precision not in ("auto", "bfloat16", "float32"):
        problems.append(f"precision must be auto, bfloat16 or float32, is {config.precision!r}")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = ["auto", "cpu", *(["cuda", *gpus] if gpus else [])]
    if config.device not in devices:
        problems.append(f"device={config.device} is not on this machine. Give device={' or device='.join(devices)}.")
    if world_size() > 1 and ":" in config.device:
        problems.append(f"device={config.device} would be the GPU of all {world_size()} processes. Give device=cuda.")
    return problems
