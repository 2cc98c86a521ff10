"""The list of faults fits the source."""

import subprocess
import sys
from collections import Counter

import pytest

from tests.conftest import REPOSITORY
from tests.mutants.faults import Fault, read_faults

FAULTS = read_faults()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_old_text_of_a_fault_stands_once_in_its_file(fault: Fault) -> None:
    """A fault that no longer fits is a line of its .toml to renew, not to delete."""
    assert not fault.problem(REPOSITORY)
    assert fault.old != fault.new and fault.about and fault.tests


@pytest.mark.end_to_end
def test_the_tests_of_all_faults_are_collected():
    """Also with the ids of their cases, which a new parameter changes."""
    tests = sorted({test for fault in FAULTS for test in fault.tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *tests]
    collected = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert collected.returncode == 0, collected.stdout + collected.stderr


def test_names_are_unique():
    assert not [name for name, count in Counter(fault.name for fault in FAULTS).items() if count > 1]
