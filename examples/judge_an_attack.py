"""Judge an attack of your own: replace `attack`, the models and the images by yours. docs/test-your-own.md."""

import medsec  # noqa: F401, I001  (before torch: it pins the instruction set, so that numbers repeat)
import torch

from medsec.judge.attack import judge_attack


def attack(model, x, y, eps, generator):
    """The whole image brighter or, if that turns no answer, darker: made for networks that hide their gradient."""
    brighter, darker = (x + eps).clamp(0, 1), (x - eps).clamp(0, 1)
    turned = model(brighter).argmax(1) != y
    return torch.where(turned[:, None, None, None], brighter, darker)


def plain(x):
    """Brighter than a half: class 1."""
    return (x.mean((1, 2, 3)) - 0.5)[:, None] * torch.tensor([-1.0, 1.0])


brightness = torch.linspace(0.4, 0.6, 60)
images, labels = brightness[:, None, None, None].expand(60, 3, 16, 16), (brightness > 0.5).long()
models = {"plain": plain, "rounded": lambda x: plain((x * 100).round() / 100)}  # whose gradient is 0
report = judge_attack(attack, models, images, labels, eps=0.04, name="brighter or darker")
print(report)
# Path("report.html").write_text(report.to_html(), encoding="utf-8") keeps it, with figures.
