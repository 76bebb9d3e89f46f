"""Whether a large tensor would fit into memory, checked before it is allocated."""

from pathlib import Path

import torch

from growconv.errors import GeometryError


def available_bytes(device: torch.device | str | None = None) -> int | None:
    """Bytes that could be allocated now.

    Args:
        device: where; None is the CPU.

    Returns:
        Free memory of a CUDA device, available memory of the machine (Linux), or None where it is not known.
    """
    kind = torch.device(device or "cpu")
    if kind.type == "cuda":
        free, _ = torch.cuda.mem_get_info(kind)
        return free + torch.cuda.memory_reserved(kind) - torch.cuda.memory_allocated(kind)
    if kind.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def require_memory(needed: int, device: torch.device | str | None, what: str, where: str, fix: str) -> None:
    """Raise when a tensor would not fit.

    Args:
        needed: bytes it would take.
        device: where it would be allocated.
        what: the tensor, for the message.
        where: the function that would build it.
        fix: what to do instead.

    Raises:
        GeometryError: saying the bytes it would take, before anything was allocated.
    """
    limit = available_bytes(device)
    if limit is not None and needed > limit:
        raise GeometryError(
            f"{what} would not fit into memory",
            expected=f"at most {_human(limit)} on {torch.device(device or 'cpu')}",
            got=f"{needed} bytes ({_human(needed)})",
            where=where,
            fix=fix,
        )


def _human(count: int | float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
