"""A student trained by Lightning from a cache of photographs."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torchvision.datasets import ImageFolder
from torchvision.models import mobilenet_v3_small
from torchvision.transforms import v2

import kdcache
from kdcache.adapters.lightning import CachedDataModule


class Student(LightningModule):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = mobilenet_v3_small(num_classes=classes)

    def training_step(self, batch, step):
        images, labels, teacher_logits = batch
        loss = kdcache.losses.kd_with_labels(self.network(images), teacher_logits, labels, temperature=4, alpha=0.9)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


cache = kdcache.open_cache("runs/photos.zarr", split="train")
prepare = v2.Compose([v2.ToImage(), v2.Resize((32, 32)), v2.ToDtype(torch.float32, scale=True)])
data = CachedDataModule(kdcache.join(ImageFolder("photos/train"), cache, transform=prepare), batch_size=8)
trainer = Trainer(max_epochs=2, accelerator="auto", devices=1, logger=False, enable_checkpointing=False)
trainer.fit(Student(len(cache.classes)), data)  # each epoch has its own order and view
print(trainer.callback_metrics["loss"].item())
