"""Nodes from the environment, from Slurm, and refusals of copies of one command."""

import base64
import json

import pytest

from launch.lib.nodes import first_host, nodes, world_info

GIVEN = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node1"}
SRUN = {
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NNODES": "4", "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "24001",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, {"NNODES": "1"}),
        ({"NNODES": "", "MASTER_ADDR": "left", "MASTER_PORT": "7"}, {"NNODES": "1"}),
        ({"NNODES": "1", "NODE_RANK": "0"}, {"NNODES": "1"}),
        ({"HOSTFILE": "hosts", "SLURM_NNODES": "2"}, {"NNODES": "1"}),
        (GIVEN, {**GIVEN, "MASTER_PORT": "29500"}),
        ({**GIVEN, "MASTER_PORT": "7", "SLURM_NNODES": "9"}, {**GIVEN, "MASTER_PORT": "7"}),
        (SRUN, {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "20001"}),
        (SRUN | {"MASTER_ADDR": "node1"}, {**GIVEN, "MASTER_PORT": "20001"}),
        ({"SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "4"}, {"NNODES": "1"}),
    ],
)  # fmt: skip
def test_nodes(variables: dict[str, str], expected: dict[str, str]) -> None:
    assert nodes(variables) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NODE_RANK": "1"}, "NODE_RANK needs NNODES"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NNODES 2 needs NODE_RANK: the number of this node, from 0"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES 2 needs MASTER_ADDR: the address of node 0"),
        ({**GIVEN, "NODE_RANK": "2"}, "NODE_RANK 2: must be a number from 0 to 1"),
        ({**GIVEN, "NNODES": "0"}, "NNODES 0: must be a number from 1"),
        ({**GIVEN, "NNODES": "two"}, "NNODES two: must be a number from 1"),
        ({**GIVEN, "MASTER_PORT": "x"}, "MASTER_PORT x: must be a number from 1 to 65535"),
        ({**GIVEN, "HOSTFILE": "hosts"}, "HOSTFILE and NNODES exclude each other"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "16"}, "srun started 16 tasks on 2 nodes; one task per node"),
        ({"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 tasks on 1 node;"),
        ({"SLURM_NNODES": "4"}, "Slurm has allotted 4 nodes, and this command runs on one of them"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "4 copies of this command were started (OMPI_COMM_WORLD_SIZE)"),
        ({"PMI_SIZE": "4"}, "4 copies of this command were started (PMI_SIZE)"),
    ],
)
def test_refusals(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        nodes(variables)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("nodelist", "expected"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[03-05,9],login", "node03"),
        ("a,b[1-2]", "a"),
        ("r[1-2]c[3,7]", "r1c3"),
    ],
)
def test_first_host(nodelist: str, expected: str) -> None:
    assert first_host(nodelist) == expected


def test_world_info() -> None:
    """As DeepSpeed's launcher reads it."""
    assert json.loads(base64.urlsafe_b64decode(world_info(2, "0,3"))) == {"node0": [0, 3], "node1": [0, 3]}


def test_world_info_of_hosts_with_other_numbers_of_gpus() -> None:
    """The GPUs are those of this host, which is the second one."""
    info = json.loads(base64.urlsafe_b64decode(world_info(3, "0,3", "1 2 4")))
    assert info == {"node0": [0], "node1": [0, 3], "node2": [0, 1, 2, 3]}
