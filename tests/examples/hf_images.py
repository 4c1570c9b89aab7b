"""An image classifier of Hugging Face from a cache of photographs."""

import torch
from datasets import load_dataset
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, ViTImageProcessor

import kdcache
from kdcache.adapters.transformers import DistillationTrainer

cache = kdcache.open_cache("runs/photos.zarr", split="train")
photos = load_dataset("imagefolder", data_dir="photos", split="train")  # dicts of image and label
processor = ViTImageProcessor(size={"height": 32, "width": 32})
data = kdcache.join(
    photos,
    cache,
    input_key="image",
    label_key="label",
    transform=lambda image: {"pixel_values": torch.as_tensor(processor(image.convert("RGB"))["pixel_values"][0])},
)
shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
student = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=len(cache.classes), **shape))
trainer = DistillationTrainer(
    student,
    TrainingArguments("runs/hf-images", num_train_epochs=2, per_device_train_batch_size=8, report_to="none"),
    train_dataset=data,
    temperature=4,
    alpha=0.9,
)
print(trainer.train().training_loss)
