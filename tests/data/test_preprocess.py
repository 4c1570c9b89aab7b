import pytest
import torch

from kdcache.core.errors import ModelError
from kdcache.data.preprocess import Preprocessor
from kdcache.store.records import Preprocess

MEAN, STD = (0.1, 0.4, 0.7), (0.2, 0.5, 0.3)


def by_hand(inputs: torch.Tensor) -> torch.Tensor:
    """The definition in float64, channel by channel."""
    values = inputs.double() / 255 if inputs.dtype == torch.uint8 else inputs.double()
    values = values.expand(-1, 3, -1, -1)
    return torch.stack([(values[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("source", [torch.uint8, torch.int16, torch.float32, torch.float64])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_per_batch_is_the_formula(channels, source, dtype, error):
    inputs = torch.randint(0, 200, (4, channels, 5, 6)).to(source)
    before = inputs.clone()
    preprocessor = Preprocessor(Preprocess(mean=MEAN, std=STD))
    for _ in range(2):  # the second time from the stored constants
        result = preprocessor.per_batch(inputs, dtype)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), by_hand(inputs), rtol=error, atol=error)
    assert torch.equal(inputs, before), "the shared input must not be overwritten"


def test_without_mean_uint8_is_scaled_and_the_rest_only_cast():
    preprocessor = Preprocessor(Preprocess())
    assert preprocessor.per_batch(torch.tensor([[0, 255]], dtype=torch.uint8), torch.float64).tolist() == [[0.0, 1.0]]
    floats = torch.tensor([[0.5, 255.0]])
    assert preprocessor.per_batch(floats, torch.float32).tolist() == [[0.5, 255.0]]


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 8, 8, 3), (2,)])
def test_channels_that_do_not_fit_are_refused(shape):
    with pytest.raises(ModelError, match=r"3 channels") as caught:
        Preprocessor(Preprocess(mean=MEAN, std=STD)).per_batch(torch.zeros(shape), torch.float32)
    assert str(shape) in caught.value.found
    assert "1 or 3" in caught.value.needed
    assert ("channels first" if shape[-1] == 3 else "--mean") in caught.value.remedy


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_batch_gets_the_pixels_of_its_samples(interpolation, dtype):
    preprocessor = Preprocessor(Preprocess(resize=20, crop=16, interpolation=interpolation))
    images = torch.randint(0, 256, (5, 3, 33, 47)).to(dtype)
    alone = torch.stack([preprocessor.per_sample(image) for image in images])
    assert alone.shape == (5, 3, 16, 16)
    assert torch.equal(preprocessor.per_sample(images), alone)


def test_geometry_keeps_the_centre_and_can_do_nothing():
    image = torch.arange(36, dtype=torch.uint8).reshape(1, 6, 6)
    assert torch.equal(Preprocessor(Preprocess(crop=2)).per_sample(image), image[:, 2:4, 2:4])
    assert Preprocessor(Preprocess()).per_sample(image) is image
    with pytest.raises(ModelError, match="shape"):
        Preprocessor(Preprocess(crop=2)).per_sample(torch.zeros(6))


@pytest.mark.parametrize(
    "record", [Preprocess(), Preprocess(resize=20), Preprocess(resize=9, crop=7), Preprocess(crop=50)]
)
@pytest.mark.parametrize("mean", [(), MEAN])
@pytest.mark.parametrize("shape", [(3, 33, 47), (1, 40, 21)])
def test_output_shape_foretells_the_shape(record, mean, shape):
    record = Preprocess(resize=record.resize, crop=record.crop, mean=mean, std=mean)
    preprocessor = Preprocessor(record)
    result = preprocessor.per_batch(preprocessor.per_sample(torch.zeros(shape))[None], torch.float32)
    assert preprocessor.output_shape(shape) == tuple(result.shape[1:])


def test_output_shape_of_other_inputs():
    assert Preprocessor(Preprocess()).output_shape((7,)) == (7,)
    assert Preprocessor(Preprocess()).output_shape(()) == ()
    assert Preprocessor(Preprocess(resize=8)).output_shape(None) is None
    assert Preprocessor(Preprocess(crop=8)).output_shape(None) is None
    assert Preprocessor(Preprocess(crop=8, mean=MEAN, std=STD)).output_shape(None) == (3, 8, 8)


def test_an_unknown_interpolation_is_refused():
    with pytest.raises(ModelError, match="lanczos"):
        Preprocessor(Preprocess(interpolation="lanczos"))
