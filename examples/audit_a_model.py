"""Audit a classifier of your own: replace the two marked parts by your model and your images. docs/test-your-own.md."""

import medsec  # noqa: F401, I001  (before torch: it pins the instruction set, so that numbers repeat)
import torch
from torchvision.models import resnet18

from medsec.judge.classifier import audit

# Your model, with its weights: any torch module that makes logits of images in [0, 1]. (Untrained, as this one, it has one
# answer for every image, and the report says so.)
torch.manual_seed(0)
model = resnet18(num_classes=2).eval()

# Your images (n, C, H, W) in [0, 1] that it was not trained on, and their labels (n,).
images, labels = torch.rand(40, 3, 64, 64), torch.arange(40) % 2

report = audit(model, images, labels, eps=4 / 255, name="resnet18")
print(report)
# Path("report.html").write_text(report.to_html(), encoding="utf-8") keeps it, with figures.
