"""Each standing rule carries weight: a worker without it fails a test (FAULTS.md, J1 to J9)."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.without import RULES

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("rule", [pytest.param(rule, marks=pytest.mark.fault(rule)) for rule in RULES])
def test_without_it_a_test_fails(rule: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--timeout", "20", "--without", rule, RULES[rule].proof]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout[-2000:] + ran.stderr[-500:]
    assert "1 failed" in ran.stdout
