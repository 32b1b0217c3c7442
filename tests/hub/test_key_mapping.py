import pytest
import torch
from diffusers import AutoencoderKLWan

from wam_policy.errors import WeightsError
from wam_policy.hub.foreign import key_mapping, wan
from wam_policy.hub.foreign.shapes import infer_config
from wam_policy.models.config import FastWAMConfig
from wam_policy.models.fast_wam.model import FastWAM

LAYERS = 30
TABLES = {
    "upstream": key_mapping.UPSTREAM,
    "lerobot_legacy": key_mapping.LEROBOT_LEGACY,
    "lerobot": key_mapping.lerobot(LAYERS),
}
FULL_SIZE_VAE = {"wan2.2": wan.WAN22_CODEC, "wan2.1": {}}


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return FastWAM(FastWAMConfig(action_dim=7, proprio_dim=8)).state_dict()


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_all_1651_names_go_there_and_back(table, full_size):
    theirs = key_mapping.from_native(full_size, table)
    assert len(theirs) == 1651
    back = key_mapping.to_native(theirs, table)
    assert list(back) == list(full_size) and all(back[name] is full_size[name] for name in back)


@pytest.mark.parametrize(
    ("ours", "upstream", "lerobot"),
    [
        (
            "video.blocks.7.self_attn.q.weight",
            "mot.mixtures.video.blocks.7.self_attn.q.weight",
            "model.mot.layers.7.blocks.video.self_attn.q.weight",
        ),
        (
            "action.blocks.0.modulation",
            "mot.mixtures.action.blocks.0.modulation",
            "model.mot.layers.0.blocks.action.modulation",
        ),
        (
            "video.head.head.bias",
            "mot.mixtures.video.head.head.bias",
            "model.mot.mixtures.video.head.head.bias",
        ),
        (
            "action.action_encoder.weight",
            "mot.mixtures.action.action_encoder.weight",
            "model.mot.mixtures.action.action_encoder.weight",
        ),
        ("proprio_encoder.weight", "proprio_encoder.weight", "model.proprio_encoder.weight"),
    ],
)
def test_names_are_those_the_projects_use(ours, upstream, lerobot):
    assert list(key_mapping.from_native({ours: 0}, key_mapping.UPSTREAM)) == [upstream]
    assert list(key_mapping.from_native({ours: 0}, key_mapping.LEROBOT_LEGACY)) == [
        f"model.{upstream}"
    ]
    assert list(key_mapping.from_native({ours: 0}, key_mapping.lerobot(LAYERS))) == [lerobot]


def test_the_full_size_has_the_released_shapes(full_size):
    theirs = {name: list(x.shape) for name, x in key_mapping.from_native(full_size).items()}
    assert sum(name.startswith("mot.mixtures.video.") for name in theirs) == 825
    assert sum(name.startswith("mot.mixtures.action.") for name in theirs) == 824
    expected = {
        "mot.mixtures.video.patch_embedding.weight": [3072, 48, 1, 2, 2],
        "mot.mixtures.video.time_projection.1.weight": [18432, 3072],
        "mot.mixtures.video.blocks.29.ffn.0.weight": [14336, 3072],
        "mot.mixtures.video.head.head.weight": [192, 3072],
        "mot.mixtures.video.head.modulation": [1, 2, 3072],
        "mot.mixtures.action.blocks.29.cross_attn.o.weight": [1024, 3072],
        "mot.mixtures.action.blocks.0.self_attn.norm_q.weight": [3072],
        "mot.mixtures.action.head.weight": [7, 1024],
        "proprio_encoder.weight": [4096, 8],
    }
    assert {name: theirs[name] for name in expected} == expected


def manifest(action: int, proprio: int) -> dict[str, list[int]]:
    """Upstream's names and shapes at full size, as the released Fast-WAM checkpoint has them."""
    video = 3072
    small = 1024
    inner = 3072
    text = 4096

    def both(name: str, *shape: int) -> dict[str, list[int]]:
        return {f"{name}.weight": list(shape), f"{name}.bias": [shape[0]]}

    def expert(dim: int, ffn: int) -> dict[str, list[int]]:
        found = {
            "time_embedding.0": (dim, 256),
            "time_embedding.2": (dim, dim),
            "time_projection.1": (6 * dim, dim),
        }
        found |= {"text_embedding.0": (dim, text), "text_embedding.2": (dim, dim)}
        plain: dict[str, list[int]] = {}
        for i in range(LAYERS):
            block = f"blocks.{i}."
            for attention in ("self_attn", "cross_attn"):
                found |= {f"{block}{attention}.{x}": (inner, dim) for x in "qkv"} | {
                    f"{block}{attention}.o": (dim, inner)
                }
                plain |= {f"{block}{attention}.norm_{x}.weight": [inner] for x in "qk"}
            found |= {
                f"{block}norm3": (dim,),
                f"{block}ffn.0": (ffn, dim),
                f"{block}ffn.2": (dim, ffn),
            }
            plain[f"{block}modulation"] = [1, 6, dim]
        return plain | {
            name: x for key, shape in found.items() for name, x in both(key, *shape).items()
        }

    seen = (
        expert(video, 14336)
        | both("patch_embedding", video, 48, 1, 2, 2)
        | both("head.head", 192, video)
    )
    seen |= {"head.modulation": [1, 2, video]}
    acted = (
        expert(small, 4096) | both("action_encoder", small, action) | both("head", action, small)
    )
    experts = {"video": seen, "action": acted}
    named = {
        f"mot.mixtures.{expert}.{name}": shape
        for expert, part in experts.items()
        for name, shape in part.items()
    }
    return named | both("proprio_encoder", text, proprio)


@pytest.mark.parametrize(("action", "proprio"), [(7, 8), (14, 14)])
def test_every_full_size_name_has_the_published_shape(action, proprio):
    with torch.device("meta"):
        ours = FastWAM(FastWAMConfig(action_dim=action, proprio_dim=proprio)).state_dict()
    assert {name: list(x.shape) for name, x in key_mapping.from_native(ours).items()} == manifest(
        action, proprio
    )


def test_names_no_table_knows_are_kept_for_the_strict_load_to_report():
    assert key_mapping.to_native({"optimizer.state": 0}) == {"optimizer.state": 0}


@pytest.mark.parametrize("family", FULL_SIZE_VAE)
def test_the_codec_s_names_go_there_and_back_and_none_is_left_out(family):
    with torch.device("meta"):
        ours = AutoencoderKLWan(**FULL_SIZE_VAE[family]).state_dict()
    table = key_mapping.wan_vae(4, 2, residual=family == "wan2.2")
    theirs = key_mapping.from_native(ours, table)
    assert list(key_mapping.to_native(theirs, table)) == list(ours)
    untouched = [
        name for name in theirs if "resnets" in name or "_block" in name or "conv_in" in name
    ]
    assert untouched == []


def test_the_released_codec_s_names_are_those_of_its_file():
    table = key_mapping.wan_vae(4, 2, residual=True)
    ours = {
        "encoder.down_blocks.1.downsampler.time_conv.weight": (
            "encoder.downsamples.1.downsamples.2.time_conv.weight"
        ),
        "decoder.up_blocks.0.upsampler.resample.1.bias": (
            "decoder.upsamples.0.upsamples.3.resample.1.bias"
        ),
        "encoder.conv_out.weight": "encoder.head.2.weight",
        "encoder.mid_block.attentions.0.to_qkv.weight": "encoder.middle.1.to_qkv.weight",
    }
    assert list(key_mapping.from_native(dict.fromkeys(ours), table)) == list(ours.values())


WRAPPED = {
    **TABLES,
    "inside_a_module": {ours: f"module.{theirs}" for ours, theirs in key_mapping.UPSTREAM.items()},
    "inside_a_policy": {
        ours: f"policy.model.{theirs}" for ours, theirs in key_mapping.UPSTREAM.items()
    },
    "old_aliases": {
        "video.": "video_expert.",
        "action.": "model.action_expert.",
        "proprio_encoder.": "model.proprio_encoder.",
    },
    "our_own": {},
}


@pytest.mark.parametrize("table", WRAPPED.values(), ids=WRAPPED)
def test_a_policy_is_read_whatever_its_layout_and_what_it_was_inside_of(table, full_size):
    back = key_mapping.policy_to_native(key_mapping.from_native(full_size, table))
    assert back.keys() == full_size.keys() and all(back[name] is full_size[name] for name in back)


def test_the_sizes_of_the_released_model_are_read_off_its_shapes(full_size):
    assert FastWAMConfig(**infer_config(full_size, head_dim=128)) == FastWAMConfig(
        action_dim=7, proprio_dim=8
    )
    with pytest.raises(WeightsError, match="pass another `head_dim`"):
        infer_config(full_size, head_dim=100)
    with pytest.raises(WeightsError, match=r"lack 'video\.blocks\.0\.ffn\.0\.weight'"):
        infer_config(
            {n: x for n, x in full_size.items() if n != "video.blocks.0.ffn.0.weight"}, head_dim=128
        )


def test_the_released_codec_s_configuration_is_read_off_its_shapes():
    config = FULL_SIZE_VAE["wan2.2"] | {"temperal_downsample": [False, True, True]}
    with torch.device("meta"):
        ours = AutoencoderKLWan(**config).state_dict()
    theirs = key_mapping.from_native(ours, key_mapping.wan_vae(4, 2, residual=True))
    found, back = wan.video_vae(theirs)
    assert back.keys() == ours.keys()
    assert {k: found[k] for k in config if not k.startswith("latents")} == {
        k: v for k, v in config.items() if not k.startswith("latents")
    }
    assert len(found["latents_mean"]) == len(found["latents_std"]) == 48 and (
        found["dim_mult"]
    ) == [1, 2, 4, 4]
