"""A student of timm from a cache of photographs, with timm's loader and task."""

import timm
import torch
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from torchvision.datasets import ImageFolder

import kdcache
from kdcache.adapters.timm import CachedDistillationTask, PackedTargets

cache = kdcache.open_cache("runs/photos.zarr", split="train")
data = PackedTargets(kdcache.join(ImageFolder("photos/train"), cache))
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
loader = create_loader(data, (3, 32, 32), batch_size=8, is_training=True, no_aug=True, num_workers=0, device=device)
student = timm.create_model("test_resnet", num_classes=len(cache.classes)).to(device)
task = CachedDistillationTask(student, temperature=4, alpha=0.9, device=device)
optimizer = create_optimizer_v2(task, opt="adamw", lr=1e-3)
for epoch in range(2):
    data.set_epoch(epoch)  # the view
    for images, targets in loader:
        result = task(images, targets)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {result['loss'].item():.4f}, of the teacher {result['kd_loss'].item():.4f}")
