"""A whole run while everything that can die does: whatever happens, typing the same command again is enough.

The long form is `tools/chaos`.
"""

from pathlib import Path

import pytest
from _chaos.faults import FAULTS
from _chaos.rounds import disturbed, undisturbed
from sandbox import Sandbox

ONE = ("iterations=1",)
PLAN = {"faults": 15, "shortest": 2, "longest": 5}
KINDS = tuple(kind for kind in FAULTS if kind != "task held")
"""All but the one that takes minutes."""


@pytest.mark.timeout(1500)
def test_a_run_amid_faults_gives_the_bytes_of_an_undisturbed_one_and_no_shard_runs_twice_at_once(
    slurm_sandbox: Sandbox, tmp_path: Path
) -> None:
    quiet = undisturbed(tmp_path / "undisturbed", slurm_sandbox.conf, ONE)
    outcome = disturbed(slurm_sandbox.folder, slurm_sandbox.conf, tmp_path, quiet, 11, ONE, PLAN, 1200, KINDS)
    print(outcome.table())
    assert outcome.differences == []
    assert outcome.duplicates == []
    assert (outcome.rows_lost, outcome.commands) == (0, 0)
    assert outcome.injected.total() >= 10, "the run was over before it was disturbed: this proves little"
    assert set(outcome.injected) <= set(FAULTS)
    assert "worker killed" in outcome.injected, "faults before anybody worked prove little, too"
    assert outcome.executions <= 3 * outcome.shards
