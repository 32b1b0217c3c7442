"""Whatever stands in a document, its reader returns or raises an error of this package."""

import copy
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from foreign_datasets import CONTRACT, make_info, write_v2, write_v3
from foreign_files import LIGHT, SIZES, lerobot, light_tensors, light_upstream, statistics, tensors
from fuzz_mutations import entries
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_policy

from wam_policy import WAMPolicy
from wam_policy.config import PolicyConfig
from wam_policy.contract import EnvContract
from wam_policy.data.lerobot_reader import LeRobotDataset
from wam_policy.data.minari import _read_contract
from wam_policy.errors import WAMPolicyError
from wam_policy.evaluation import results
from wam_policy.hub import adapters, checksums, components, dataset_stats, weights
from wam_policy.hub.foreign import lerobot_config
from wam_policy.hub.foreign.light_wam_config import RunFile, run_release
from wam_policy.hub.info import InfoConfig, info
from wam_policy.presets import PRESETS, ReleaseInfo, preset_of
from wam_policy.training.initialization import read_init_weights

VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(width=64)
    | st.text(max_size=8)
    | st.sampled_from(["..", "/etc", "{x}", "x" * 300, "NaN"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def plain(value):
    """A dataclass or a mapping as JSON data."""
    return json.loads(json.dumps(value, default=vars))


def damaged(document):
    """Strategy: the document with some entries replaced or removed."""

    @st.composite
    def draw_damage(draw):
        data = copy.deepcopy(document)
        for _ in range(draw(st.integers(1, 2))):
            places = list(entries(data))
            if not places:
                break
            container, key = draw(st.sampled_from(range(len(places))).map(places.__getitem__))
            if draw(st.booleans()):
                container[key] = draw(VALUE)
            else:
                del container[key]
        return data

    return draw_damage() | VALUE


def never_another_error(read):
    """Call a reader; errors of this package are what it may raise."""
    try:
        read()
    except WAMPolicyError as error:
        assert str(error)


def check(document, write, read):
    """Read the damaged document many times."""

    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(damaged(document))
    def run(data):
        write(data)
        never_another_error(read)

    run()


def check_file(path: Path, read) -> None:
    """Damage the JSON document in a file."""
    document = json.loads(path.read_text(encoding="utf-8"))
    check(document, lambda data: path.write_text(json.dumps(data), encoding="utf-8"), read)


@pytest.fixture
def folder(tmp_path):
    return make_policy().save_pretrained(tmp_path / "policy")


def test_config_json():
    policy = make_policy()
    document = json.loads(policy.config.to_json())
    texts = []
    check(
        document,
        lambda data: texts.append(json.dumps(data)),
        lambda: PolicyConfig.from_json(texts[-1]),
    )


@pytest.mark.parametrize("name", ["config.json", "vae/config.json"])
def test_documents_of_a_checkpoint(folder, name):
    check_file(folder / name, lambda: WAMPolicy.from_pretrained(folder).vae)


def test_an_index_of_shards(folder):
    weights.write_weights(folder, make_policy().model.state_dict(), shard_bytes=4000)
    (folder / "model.safetensors").unlink()
    path = folder / "model.safetensors.index.json"
    check_file(path, lambda: weights.read_weights(folder))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_a_safetensors_header(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(len(content).to_bytes(8, "little") + content)
        never_another_error(lambda: weights.read_weights_file(path))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_a_list_of_sums(content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "SHA256SUMS").write_bytes(content)
        never_another_error(lambda: checksums.verify(Path(folder)))


@pytest.mark.parametrize("mode", ["min_max", "quantile", "z_score", "identity"])
def test_statistics(tmp_path, mode):
    path = tmp_path / "dataset_stats.json"
    path.write_text(json.dumps(statistics()))

    def read():
        dataset_stats.read_normalization(path, "action", mode, 7)
        dataset_stats.was_computed_from(path, "0")

    check_file(path, read)


@pytest.mark.parametrize(
    "name", ["config.json", "policy_preprocessor.json", "policy_postprocessor.json"]
)
def test_documents_of_lerobot_s_policies(tmp_path, name):
    folder = lerobot(
        tmp_path / "policy", tensors(), action_dit_config={"attn_head_dim": SIZES.head_dim}
    )

    def read():
        if lerobot_config.is_lerobot(folder):
            lerobot_config.head_dim(folder)
            lerobot_config.read_policy_config(folder, SIZES)

    check_file(folder / name, lambda: WAMPolicy.from_pretrained(folder))


def test_a_run_of_light_wam(tmp_path):
    import yaml

    path = light_upstream(tmp_path, light_tensors())
    run = tmp_path / "config.yaml"
    document = yaml.safe_load(run.read_text())
    release = ReleaseInfo(preset="libero", head_dim=LIGHT.head_dim)

    def read():
        run_release(RunFile(run), None)
        WAMPolicy.from_pretrained(path, release=release)

    check(document, lambda data: run.write_text(yaml.safe_dump(plain(data))), read)


def test_a_preset_of_one_s_own_robot(tmp_path):
    path = tmp_path / "robot.json"
    path.write_text(json.dumps(preset_document()))
    check_file(path, lambda: preset_of("fast_wam", str(path)))


def preset_document():
    from dataclasses import asdict

    return asdict(PRESETS["libero"])


def test_an_adapter_config(tmp_path):
    path = tmp_path / "adapter_config.json"
    content = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "x", "lora_alpha": 8}
    path.write_text(json.dumps(content))
    check_file(path, lambda: adapters.read_adapter_config(tmp_path))


def test_a_text_encoder_s_config(tmp_path):
    from wam_policy.models.encoders.text import untrained_encoder

    untrained_encoder(["fly"], 8, 0).model.save_pretrained(tmp_path)
    check_file(tmp_path / "config.json", lambda: components._text_config(tmp_path))


def test_parts_to_train_from(tmp_path):
    path = tmp_path / "base.json"
    path.write_text(json.dumps({"format_version": 1, "sizes": {"layers": 2, "heads": 2}}))
    weights.write_weights(tmp_path, {"video.a": torch.ones(2)})

    def read():
        info(InfoConfig(src=str(tmp_path)))
        read_init_weights(tmp_path)

    check_file(path, read)


# -- datasets --------------------------------------------------------------------------------------


def read_dataset(folder):
    dataset = LeRobotDataset(folder)
    dataset.instructions()
    dataset.action_layout()
    for key in dataset.names:
        dataset.vector(key)
    for key in dataset.cameras:
        dataset.frame_size(key)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_info_of_a_dataset(tmp_path, version):
    folder = (write_v2 if version == "v2.1" else write_v3)(tmp_path / "d")
    path = folder / "meta/info.json"
    check(
        make_info(version),
        lambda data: path.write_text(json.dumps(data)),
        lambda: read_dataset(folder),
    )


@pytest.mark.parametrize("name", ["episodes", "tasks"])
def test_lines_of_a_dataset(tmp_path, name):
    folder = write_v2(tmp_path / "d")
    path = folder / f"meta/{name}.jsonl"
    document = [json.loads(line) for line in path.read_text().splitlines()]

    def write(data):
        rows = data if isinstance(data, list) else [data]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    check(document, write, lambda: read_dataset(folder))


@pytest.mark.parametrize("name", ["meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"])
def test_tables_of_a_dataset(tmp_path, name):
    folder = write_v3(tmp_path / "d")
    path = folder / name
    document = pq.read_table(path).to_pydict()

    def write(data):
        try:
            pq.write_table(pa.table(data), path)
        except (pa.ArrowException, TypeError, ValueError, AttributeError, OverflowError):
            path.write_bytes(b"no table")

    check(document, write, lambda: read_dataset(folder))


def test_contracts(tmp_path):
    folder = write_v2(tmp_path / "d")
    path = folder / "meta/wam_contract.json"
    check(
        CONTRACT,
        lambda data: path.write_text(json.dumps(data)),
        lambda: LeRobotDataset(folder).action_layout(),
    )
    contract = CONTRACT | {
        "cameras": {"front": "img"},
        "state": "pos",
        "state_names": ["x"],
        "instruction": "go",
    }
    assert isinstance(_read_contract_of(tmp_path, contract), EnvContract)
    path = tmp_path / "contract.json"
    check(
        contract,
        lambda data: path.write_text(json.dumps(data)),
        lambda: _read_contract(path),
    )


def _read_contract_of(folder, contract):
    path = folder / "contract.json"
    path.write_text(json.dumps(contract))
    return _read_contract(path)


# -- results ---------------------------------------------------------------------------------------


def test_results_of_an_evaluation(tmp_path):
    episode = {"task": "a", "seed": 1, "success": True, "steps": 3, "reward": 1.0}
    rows = [episode | {"latency_ms": [1.0]}, episode | {"seed": 2, "latency_ms": []}]
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "summary.json").write_text(json.dumps({"env": "x", "tasks": {}}))

    def write(data):
        lines = data if isinstance(data, list) else [data]
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (tmp_path / "episodes.jsonl").write_text(text)

    def read():
        results.read_episodes(tmp_path)
        results.open_results(tmp_path, {})

    check(rows, write, read)
