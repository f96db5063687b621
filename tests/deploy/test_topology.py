"""Rank and address from the environments of the schedulers that we know."""

import pytest

from deploy.topology import Topology, discover, first_host, overlooked_tasks
from pipeline.common.errors import ConfigConflict, UsageError


def topology(environment: dict[str, str], host: str = "localhost", gpus: int = 0, **options: int | str) -> Topology:
    return discover(options, environment, hostname=lambda: host, devices=lambda: gpus)


def test_alone_there_is_nothing_to_join() -> None:
    found = topology({})
    assert found.world_size == 1
    assert found.environment(0) == {}


def test_a_process_for_each_gpu() -> None:
    assert topology({}, gpus=8).world_size == 8
    assert topology({}, gpus=8, processes=2).world_size == 2


def test_an_indexed_job_knows_its_first_pod() -> None:
    found = topology(
        {"JOB_COMPLETION_INDEX": "3", "DCGAN_UNRELATED": "1"},
        host="train-3.ranks.dcgan.svc.cluster.local",
        gpus=2,
        nodes=4,
    )
    assert found == Topology(4, 3, 2, "train-0.ranks.dcgan.svc.cluster.local", 29500)
    assert found.environment(1)["RANK"] == "7"
    assert found.environment(1)["LOCAL_RANK"] == "1"
    assert found.environment(1)["WORLD_SIZE"] == "8"


def test_kubeflow_trainer() -> None:
    environment = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "auto",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "job-node-0-0.job",
        "PET_MASTER_PORT": "29400",
        "JOB_COMPLETION_INDEX": "1",
    }
    assert topology(environment, gpus=4) == Topology(2, 1, 4, "job-node-0-0.job", 29400)


def test_pytorch_job() -> None:
    environment = {"WORLD_SIZE": "3", "RANK": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    assert topology(environment) == Topology(3, 2, 1, "job-master-0", 23456)


def test_options_win() -> None:
    environment = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "there"}
    assert topology(environment, nodes=3, node_rank=0, address="here", port=5) == Topology(3, 0, 1, "here", 5)


def test_the_index_of_a_single_machine_means_something_else() -> None:
    assert topology({"JOB_COMPLETION_INDEX": "17"}).node_rank == 0


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_NNODES", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_would_each_make_a_run_of_their_own_are_noticed(name: str) -> None:
    assert f"{name}=2, but" in overlooked_tasks(topology({}), {}, {name: "2"})
    assert f"{name}=2, but" in overlooked_tasks(topology({}, gpus=8), {"nodes": None}, {name: "2"})
    assert overlooked_tasks(topology({}), {}, {name: "1"}) == ""
    assert overlooked_tasks(topology({}, nodes=1), {"nodes": 1}, {name: "2"}) == "", "meant so"
    assert overlooked_tasks(topology({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}), {}, {name: "2"}) == ""


def test_two_tasks_may_be_room_for_two_processes() -> None:
    environment = {"SLURM_NNODES": "1", "SLURM_NTASKS": "2"}
    assert overlooked_tasks(topology(environment, processes=2), {"processes": 2}, environment) == ""


@pytest.mark.parametrize(
    ("environment", "kind", "words"),
    [
        ({"LOCAL_RANK": "0"}, ConfigConflict, "another launcher"),
        ({"NNODES": "2"}, ConfigConflict, "which one"),
        ({"NNODES": "2", "NODE_RANK": "2"}, ConfigConflict, "NODE_RANK=2"),
        ({"NNODES": "2:4", "NODE_RANK": "0"}, UsageError, "NNODES=2:4"),
        ({"NNODES": "2", "NODE_RANK": "1"}, ConfigConflict, "MASTER_ADDR"),
    ],
)
def test_contradictions_are_named(environment: dict[str, str], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        topology(environment)


def test_only_the_index_of_the_host_name_changes() -> None:
    assert first_host("run-1-11.run-1.ns", 11) == "run-1-0.run-1.ns"
    with pytest.raises(ConfigConflict):
        first_host("run-12.run.ns", 1 + 1 + 1)
