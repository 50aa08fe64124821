"""Who takes part is what flags say, then the environment, then SLURM or a TPU; a part of it is refused."""

from pathlib import Path

import pytest

from search_r3_jax.distributed.spec import Cluster, explicit_cluster, is_detectable
from search_r3_jax.errors import UserError

WHOLE = {"SEARCH_R3_COORDINATOR": "host:1", "SEARCH_R3_PROCESSES": "4", "SEARCH_R3_PROCESS": "3"}


def test_flags_come_before_the_environment() -> None:
    assert explicit_cluster(Cluster(), {}) is None
    assert explicit_cluster(Cluster(), WHOLE) == Cluster(coordinator="host:1", processes=4, process=3)
    assert explicit_cluster(Cluster(process=0), WHOLE) == Cluster(
        coordinator="host:1", processes=4, process=0
    )
    asked = Cluster(coordinator="other:2", processes=2, process=1)
    assert explicit_cluster(asked, {}) == explicit_cluster(asked, WHOLE) == asked


@pytest.mark.parametrize(
    "cluster",
    [
        Cluster(coordinator="host:1"),
        Cluster(coordinator="host:1", processes=2),
        Cluster(coordinator="host", processes=2, process=0),
        Cluster(coordinator="host:1", processes=2, process=2),
        Cluster(processes=2, process=0),
    ],
)
def test_a_part_is_refused(cluster: Cluster) -> None:
    with pytest.raises(UserError, match="give all three"):
        explicit_cluster(cluster, {})


def test_slurm_and_a_tpu_are_found(tmp_path: Path) -> None:
    chip = tmp_path / "accel0"
    nowhere = (str(chip),)
    assert not is_detectable({}, nowhere)
    assert is_detectable({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, nowhere)
    # A batch script is one process, whatever its tasks will be; so is a single task.
    assert not is_detectable({"SLURM_NTASKS": "2"}, nowhere)
    assert not is_detectable({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, nowhere)
    chip.touch()
    assert is_detectable({}, nowhere)
    assert not is_detectable({"JAX_PLATFORMS": "cpu"}, nowhere)
