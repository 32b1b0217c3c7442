import pytest
import torch
from tiny import TINY_VAE

from wam_policy.errors import ObservationError
from wam_policy.models.encoders.vae import build_vae


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return build_vae(TINY_VAE).eval().requires_grad_(False)


def test_a_clip_s_first_latent_frame_is_its_first_picture_s(vae):
    video = torch.rand(2, 3, 5, 16, 24) * 2 - 1
    latents = vae.encode(video)
    assert latents.shape == (2, 4, 2, 2, 3)
    assert torch.allclose(vae.encode_first_frame(video[:, :, 0]), latents[:, :, :1], atol=1e-5)


def test_decoding_gives_back_the_clip_s_shape_in_range(vae):
    clip = vae.decode(torch.randn(1, 4, 2, 2, 3) * 10)
    assert clip.shape == (1, 3, 5, 16, 24) and clip.abs().max() <= 1


def test_latents_are_standardised_by_the_config_s_statistics(vae):
    video = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    raw = vae.model.encode(video).latent_dist.mode()
    mean, std = (
        torch.tensor(TINY_VAE[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std")
    )
    assert torch.allclose(vae.encode(video), (raw - mean) / std, atol=1e-6)


def test_a_batch_is_encoded_as_its_samples(vae):
    video = torch.rand(3, 3, 5, 16, 16) * 2 - 1
    assert torch.allclose(
        vae.encode(video), torch.cat([vae.encode(v[None]) for v in video]), atol=1e-5
    )


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 5, 20, 16)])
def test_clips_that_can_t_be_halved_evenly_are_refused(vae, shape):
    with pytest.raises(ObservationError, match="multiples of 8"):
        vae.encode(torch.zeros(shape))
