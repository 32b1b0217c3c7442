"""The examples run as they stand and stay short."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
QUICK = {"own_env.py"}


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.name, marks=() if p.name in QUICK else pytest.mark.slow) for p in EXAMPLES]
)
def test_the_example_runs(path):
    assert len(path.read_text().splitlines()) < 60
    result = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
