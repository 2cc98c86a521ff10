"""Print the GPUs for the ranks of this machine, as in "0,1" or "MIG-...". Refuses if torch cannot use them.

$NUM_GPUS: how many; default: all that $CUDA_VISIBLE_DEVICES names, by number or UUID, or all. A part of a GPU
(a MIG device) has a UUID only, and CUDA gives a process no more than one.
"""

import os
import sys
from collections.abc import Sequence

MIG = "MIG-"


def choose_part(number: str, visible: str) -> str:
    """The MIG device that CUDA_VISIBLE_DEVICES names. Raises ValueError."""
    names = [*filter(None, map(str.strip, visible.split(",")))]
    if number not in ("", "1") or not all(name.startswith(MIG) for name in names):
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES {visible}: a run uses one MIG device, or GPUs; NUM_GPUS must be 1 or unset"
        )
    if len(names) > 1 and not number:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES names {len(names)} MIG devices, and CUDA gives a process one: name one, or"
            " set NUM_GPUS=1 for the first"
        )
    return names[0]


def choose(number: str, visible: str | None, uuids: Sequence[str]) -> list[int]:
    """GPU numbers in torch's order. uuids: of all GPUs, in that order. Raises ValueError."""
    names = range(len(uuids)) if visible is None else filter(None, map(str.strip, visible.split(",")))
    chosen = [_number_of(str(name), uuids) for name in names]
    if not chosen:
        raise ValueError("CUDA_VISIBLE_DEVICES hides all GPUs; to use the CPU, set DS_ACCELERATOR=cpu")
    wanted = number or str(len(chosen))
    if not wanted.isdecimal() or not 1 <= int(wanted) <= len(chosen):
        raise ValueError(f"NUM_GPUS {number}: must be from 1 to {len(chosen)}, the GPUs that torch sees")
    return chosen[: int(wanted)]


def _number_of(name: str, uuids: Sequence[str]) -> int:
    """The number of a GPU; UUIDs may be shortened, as CUDA allows."""
    matching = [i for i, uuid in enumerate(uuids) if name == str(i) or uuid.startswith(name)]
    if len(matching) != 1:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES {name}: no such GPU; allowed: 0 to {len(uuids) - 1}, or a UUID"
        )
    return matching[0]


def main() -> None:
    number, visible = os.environ.get("NUM_GPUS", ""), os.environ.get("CUDA_VISIBLE_DEVICES")
    has_part = MIG in (visible or "")
    if not has_part:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # torch would number only these
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        part = choose_part(number, visible) if has_part else ""
        if not count:
            raise ValueError(_no_gpu(part))
        if part:
            print(part)
            return
        uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(count)]
        print(",".join(map(str, choose(number, visible, uuids))))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _no_gpu(part: str) -> str:
    """Why torch has no GPU. part: the MIG device that it was given, if any."""
    import torch

    build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    hint = f", or correct CUDA_VISIBLE_DEVICES {part}, if `nvidia-smi -L` has no such device" * bool(part)
    return (
        f"this machine has GPUs, but torch cannot use them: torch {torch.__version__} {build}; install a"
        f" newer driver (CUDA 13 needs 580), or a torch built for yours{hint}; to use the CPU, set"
        " DS_ACCELERATOR=cpu"
    )


if __name__ == "__main__":
    main()
