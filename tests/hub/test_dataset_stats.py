import json

import pytest

from wam_policy.errors import CheckpointError, ConfigError
from wam_policy.hub import dataset_stats


@pytest.fixture
def file(tmp_path):
    group = {
        "global_min": [0.0, -1.0],
        "global_max": [1.0, 3.0],
        "global_mean": [0.5, 0.0],
        "global_std": [1.0, 2.0],
    }
    path = tmp_path / "dataset_stats.json"
    path.write_text(json.dumps({"state": {"default": group}, "action": {"default": group}}))
    return path


def test_the_mode_chooses_its_statistics(file):
    assert dataset_stats.read_normalization(file, "action", "min_max", 2).statistics == {
        "min": (0.0, -1.0),
        "max": (1.0, 3.0),
    }
    assert dataset_stats.read_normalization(file, "state", "z_score", 2).statistics == {
        "mean": (0.5, 0.0),
        "std": (1.0, 2.0),
    }


def test_a_missing_file_names_the_cure(tmp_path):
    with pytest.raises(CheckpointError, match=r"no statistics at .*published beside the weights"):
        dataset_stats.read_normalization(tmp_path / "dataset_stats.json", "action", "min_max", 2)


@pytest.mark.parametrize(
    ("vector", "mode", "dim"),
    [("action", "min_max", 7), ("action", "quantile", 2), ("pose", "min_max", 2)],
)
def test_statistics_that_do_not_fit_are_refused(file, vector, mode, dim):
    with pytest.raises(CheckpointError, match=r"does not hold the|holds no|`global_q01` of the"):
        dataset_stats.read_normalization(file, vector, mode, dim)


def test_a_file_that_is_not_json_is_refused(file):
    file.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        dataset_stats.read_normalization(file, "action", "min_max", 2)


def test_an_unknown_mode_is_refused(file):
    with pytest.raises(ConfigError, match="unknown normalisation 'mean'"):
        dataset_stats.read_normalization(file, "action", "mean", 2)
