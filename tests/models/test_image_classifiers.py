"""Image classifiers from folders of transformers and from torchvision's names, with the preprocessing they bring."""

import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from kdcache.core.config import InputConfig
from kdcache.core.errors import ModelError, UsageError
from kdcache.models.registry import build_model
from kdcache.models.teacher import load_teacher
from kdcache.store.cache import open_cache
from kdcache.store.records import ViewRecipe
from tests.helpers import answer, refused, synthetic

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def save_vit(folder, processor, classes=("cat", "dog", "owl"), size=16):
    named = {"id2label": dict(enumerate(classes)), "label2id": {name: at for at, name in enumerate(classes)}}
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=size,
        patch_size=8,
        initializer_range=0.5,
        **named,
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return f"hf:{folder}"


def build(spec, **options):
    options = {"num_classes": 3, "input_shape": None, "seed": 0} | options
    settings = {name: options.pop(name) for name in ("mean", "std", "size", "resize", "crop") if name in options}
    return build_model(spec, settings=InputConfig(**settings), **options)


PROCESSORS = {
    "square": lambda: transformers.ViTImageProcessor(size={"height": 16, "width": 16}),
    "shorter side and crop": lambda: transformers.CLIPImageProcessor(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}
    ),
    "convnext": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=0.8),
    "from -1 to 1 by the factor": lambda: transformers.ViTImageProcessor(
        size={"height": 16, "width": 16},
        rescale_factor=1 / 127.5,
        image_mean=[1.0] * 3,
        image_std=[1.0] * 3,
        resample=3,
    ),
    "not normalised": lambda: transformers.ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False),
}


@pytest.mark.parametrize("what", PROCESSORS)
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (16, 16)])
def test_the_pixels_are_those_of_the_image_processor(tmp_path, what, shape):
    processor = PROCESSORS[what]()
    built = build(save_vit(tmp_path, processor))
    image = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    image = torchvision.transforms.v2.functional.resize(image, list(shape))
    wanted = torch.as_tensor(np.asarray(processor(image.numpy(), return_tensors="np")["pixel_values"]))
    found = built.preprocessor.per_batch(built.preprocessor.per_sample(image)[None], torch.float32)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2 / 255 / min(built.preprocess.std))
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(built.module.eval()(found).logits, model(pixel_values=found).logits)
    assert built.class_names == ("cat", "dog", "owl")
    assert built.has_weights


def test_what_a_record_cannot_say_is_refused_and_the_size_is_the_remedy(tmp_path):
    odd = transformers.EfficientNetImageProcessor(
        size={"height": 16, "width": 16}, rescale_offset=True, image_std=[0.3, 0.5, 0.9]
    )
    spec = save_vit(tmp_path, odd)
    with pytest.raises(ModelError, match="EfficientNetImageProcessor") as caught:
        build(spec)
    assert "--size" in caught.value.remedy
    assert "centre crop" in caught.value.needed
    assert build(spec, size=16).preprocess.crop == 16


def test_a_folder_of_another_kind_is_named(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    for folder in ("bert", "none"):
        with pytest.raises(ModelError, match="could not be read or fetched as an image classifier"):
            build(f"hf:{tmp_path / folder}")


def test_numbered_classes_are_no_names(tmp_path):
    spec = save_vit(tmp_path, PROCESSORS["square"](), classes=("LABEL_0", "LABEL_1", "LABEL_2"))
    assert build(spec).class_names is None


@pytest.fixture
def pictures(tmp_path):
    for split in ("train", "test"):
        for at, name in enumerate(("cat", "dog", "owl")):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = np.random.default_rng(number).integers(0, 80, (20, 30, 3)) + 80 * at
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return f"folder:{tmp_path / 'pictures'}"


def test_an_image_classifier_teaches_and_is_fine_tuned(tmp_path, pictures):
    spec = save_vit(tmp_path / "vit", PROCESSORS["square"]())
    brief = ("--device", "cpu", "--batch-size", 6)
    answer("dump-teacher", "--dataset", pictures, "--teacher", spec, "--out", tmp_path / "c", *brief)
    assert open_cache(tmp_path / "c").manifest.teacher.preprocess.stretch
    answer("train-teacher", "--dataset", pictures, "--model", spec, "--epochs", 1, "--out", tmp_path / "t", *brief)
    answer("evaluate", "--run", tmp_path / "t", "--device", "cpu")
    tuned = ("--teacher", spec, "--checkpoint", tmp_path / "t" / "best.pt")
    answer("dump-teacher", "--dataset", pictures, *tuned, "--out", tmp_path / "d", *brief)
    learn = ("train-student", "--cache", tmp_path / "d", "--student", "cnn", "--epochs", 1, "--out", tmp_path / "s")
    answer(*learn, *brief)
    exported = answer("export", "--run", tmp_path / "s", "--out", tmp_path / "s.pt2")
    assert exported
    message = refused(
        1, "dump-teacher", "--dataset", pictures, "--teacher", spec, "--size", 24, "--out", tmp_path / "e"
    )
    assert "give --size 16" in message
    assert "ViTForImageClassification fails on a batch of shape (2, 3, 24, 24)" in message


def fetch(*args, **options):
    raise AssertionError("nothing may be fetched")


@pytest.mark.parametrize("classes", [10, 1000])
def test_a_checkpoint_of_published_weights_is_not_fetched(tmp_path, monkeypatch, classes):
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fetch)
    saved = torchvision.models.resnet18(num_classes=classes)
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    dataset = synthetic(4, shape=(3, 40, 50), classes=classes)
    spec = "torchvision:resnet18@IMAGENET1K_V1"
    built = load_teacher(InputConfig(), spec, str(tmp_path / "w.pt"), dataset, ViewRecipe())
    assert (built.preprocess.resize, built.preprocess.crop) == (256, 224)
    assert torch.equal(built.module.fc.weight, saved.fc.weight)
    assert built.class_names == (None if classes == 10 else tuple(weights_categories()))
    built = load_teacher(InputConfig(resize=48, crop=32), spec, str(tmp_path / "w.pt"), dataset, ViewRecipe())
    assert (built.preprocess.resize, built.preprocess.crop) == (48, 32)


def weights_categories():
    return torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]


def test_a_checkpoint_of_all_classes_keeps_its_head(monkeypatch):
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fetch)

    def fits(module):
        return module.fc.out_features == 1000

    built = build("torchvision:resnet18@IMAGENET1K_V1", num_classes=10, fits=fits)
    assert built.module.fc.out_features == 1000
    assert built.class_names[0] == "tench"


def test_timm_weights_are_not_fetched_beside_a_checkpoint(tmp_path):
    pytest.importorskip("timm")
    built = build("timm:resnet18.a1_in1k", num_classes=10, fits=lambda module: True)
    assert built.module.num_classes == 10
    assert (built.preprocess.crop, built.preprocess.interpolation) == (224, "bicubic")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 8, "crop": 8}, "--size 8 is given"),
        ({"size": 8, "resize": 8}, "--size 8 is given"),
        ({"resize": 8, "crop": 9}, "--resize is 8 and --crop is 9"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(given, message):
    with pytest.raises(UsageError, match=message) as caught:
        InputConfig(**given)
    assert caught.value.needed
    assert caught.value.remedy


def test_resize_and_crop_are_options(tmp_path):
    run = ("train-teacher", "--dataset", "digits", "--model", "cnn", "--epochs", 1, "--device", "cpu")
    answer(*run, "--resize", 12, "--crop", 10, "--out", tmp_path / "t")
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    assert (config["resize"], config["crop"]) == (12, 10)
    assert "--size 8 is given" in refused(2, *run, "--resize", 12, "--size", 8, "--out", tmp_path / "u")
