"""Each standing rule carries weight: a worker without it fails a test (FAULTS.md, J1 to J9)."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.without import RULES

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param("J1", marks=pytest.mark.fault("J1")),
        pytest.param("J2", marks=pytest.mark.fault("J2")),
        pytest.param("J3", marks=pytest.mark.fault("J3")),
        pytest.param("J4", marks=pytest.mark.fault("J4")),
        pytest.param("J5", marks=pytest.mark.fault("J5")),
        pytest.param("J6", marks=pytest.mark.fault("J6")),
        pytest.param("J7", marks=pytest.mark.fault("J7")),
        pytest.param("J8", marks=pytest.mark.fault("J8")),
        pytest.param("J9", marks=pytest.mark.fault("J9")),
    ],
)
def test_without_it_a_test_fails(rule: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--timeout", "20", "--without", rule, RULES[rule].proof]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout[-2000:] + ran.stderr[-500:]
    assert "1 failed" in ran.stdout
