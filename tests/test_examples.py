"""The examples run as they stand and stay short."""

import subprocess
import sys
from pathlib import Path

import pytest

from wam_policy import WAMPolicy
from wam_policy.training.record import RecordConfig, record

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
QUICK = {"own_env.py"}


def run(path, *arguments):
    assert len(path.read_text().splitlines()) < 60
    command = [sys.executable, str(path), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.name, marks=() if p.name in QUICK else pytest.mark.slow)
        for p in EXAMPLES
        if p.name != "fine_tune.py"
    ],
)
def test_the_example_runs(path):
    run(path)


@pytest.mark.slow
def test_the_fine_tuning_example_makes_a_policy(tmp_path):
    data = record(RecordConfig(out=tmp_path / "data", tasks={"drawer-open-v3": 1}, workers=1))
    (example,) = (p for p in EXAMPLES if p.name == "fine_tune.py")
    run(example, data, tmp_path / "policy", 2)
    assert WAMPolicy.from_pretrained(tmp_path / "policy").spec.family == "fast_wam"
