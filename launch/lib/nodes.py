"""Print the nodes of this run as assignments for bash, from $NNODES and its relatives, or from Slurm.

    python launch/lib/nodes.py            prints NNODES=2 NODE_RANK=1 MASTER_ADDR=node1 MASTER_PORT=29500
    python launch/lib/nodes.py 2 0,1      prints 2 nodes with these GPUs in the format of DeepSpeed's launcher

Refuses to start when several tasks would each run alone, on one output folder.
"""

import base64
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping

MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
NAMES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
MEANING = {"NODE_RANK": "number of this node, from 0", "MASTER_ADDR": "address of node 0"}


def nodes(variables: Mapping[str, str]) -> dict[str, str]:
    """The values of NAMES; of one node, only NNODES. Raises ValueError."""
    given = {name: value for name, value in variables.items() if value}
    chosen = {name: given[name] for name in NAMES if name in given}
    if "HOSTFILE" in given:
        if "NNODES" in given or "NODE_RANK" in given:
            raise ValueError("HOSTFILE and NNODES exclude each other: HOSTFILE starts the other nodes by ssh")
        return {"NNODES": "1"}
    if "NNODES" not in given:
        if "NODE_RANK" in given:
            raise ValueError("NODE_RANK needs NNODES, the number of nodes")
        chosen = _of_slurm(given) | chosen
    number = _number("NNODES", chosen.get("NNODES", "1"), 1, 2**16)
    if "NODE_RANK" in chosen:
        _number("NODE_RANK", chosen["NODE_RANK"], 0, number - 1)
    if number == 1:
        return {"NNODES": "1"}
    for name, meaning in MEANING.items():
        if name not in chosen:
            raise ValueError(f"NNODES {number} needs {name}: the {meaning}")
    _number("MASTER_PORT", chosen.setdefault("MASTER_PORT", "29500"), 1, 2**16 - 1)
    return chosen


def _number(name: str, value: str, low: int, high: int) -> int:
    if not value.isdecimal() or not low <= int(value) <= high:
        raise ValueError(f"{name} {value}: must be a number from {low} to {high}")
    return int(value)


def _of_slurm(given: Mapping[str, str]) -> dict[str, str]:
    """The nodes of an srun; none outside of one, where copies of this command are refused."""
    if "SLURM_STEP_NUM_NODES" not in given:
        _refuse_copies(given)
        return {}
    number = int(given["SLURM_STEP_NUM_NODES"])
    tasks = int(given.get("SLURM_STEP_NUM_TASKS", number))
    if tasks > number:
        raise ValueError(
            f"srun started {tasks} tasks on {number} node{'s' * (number > 1)}; one task per node starts all"
            " its ranks: srun --ntasks-per-node=1"
        )
    if number == 1:
        return {}
    return {
        "NNODES": str(number),
        "NODE_RANK": given["SLURM_NODEID"],
        "MASTER_ADDR": first_host(given["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(20_000 + int(given["SLURM_JOB_ID"]) % 12_000),  # jobs on one node do not collide
    }


def _refuse_copies(given: Mapping[str, str]) -> None:
    if int(given.get("SLURM_NNODES", "1")) > 1:
        raise ValueError(
            f"Slurm has allotted {given['SLURM_NNODES']} nodes, and this command runs on one of them: start"
            " it by srun, or with HOSTFILE, or with NNODES=1 for this node alone"
        )
    for name in MPI:
        if int(given.get(name, "1")) > 1:
            raise ValueError(
                f"{given[name]} copies of this command were started ({name}): set NNODES, NODE_RANK and"
                " MASTER_ADDR, one copy per node, or use srun or HOSTFILE"
            )


def first_host(nodelist: str) -> str:
    """The first of Slurm's list of hosts: "node[03-05,9],login" begins with node03."""
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodelist).split(",")[0]


def world_info(number: int, gpus: str, slots: str = "") -> str:
    """DeepSpeed's list of nodes and GPUs. Of the other nodes, only the number of GPUs matters here.

    slots: by hosts.py, the number of each node; without it, all have the same.
    """
    ranks = [int(gpu) if gpu.isdecimal() else gpu for gpu in gpus.split(",")]  # MIG devices have UUIDs
    counts = [int(count) for count in slots.split()] or [len(ranks)] * number
    nodes = {f"node{i}": ranks if count == len(ranks) else [*range(count)] for i, count in enumerate(counts)}
    return base64.urlsafe_b64encode(json.dumps(nodes).encode()).decode()


def main() -> None:
    if len(sys.argv) == 3:
        print(world_info(int(sys.argv[1]), sys.argv[2], os.environ.get("TRIPTYCH_SLOTS", "")))
        return
    try:
        print(*(f"{name}={shlex.quote(value)}" for name, value in nodes(os.environ).items()))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
