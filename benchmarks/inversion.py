"""Gradient inversion: seconds a victim, in one `torch.func.vmap` and in loops over the victims, with the same result.

``python benchmarks/inversion.py`` interleaves three ways to run the attack ``ig`` on the same victims, on one thread, and
writes medians and their ratios to ``benchmarks/inversion.json``: ``together`` (`medsec.inversion.attacks`, eight
victims at once), ``one by one`` (the same code, one at a time), and ``plain loop`` (as most published code:
`torch.autograd.grad` with ``create_graph`` and `torch.optim.Adam` on each victim).
"""

import json
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import params
from medphantom import chest as phantom
from medsec.core import paths
from medsec.evidence.record import processor
from medsec.inversion import attacks as inversion
from medsec.inversion import scores as reconstruction
from medsec.nets import convnet

RESULT = paths.ROOT / "benchmarks" / "inversion.json"
VICTIMS, REPEATS = 8, 5


def plain_loop(view: inversion.View, labels: Tensor, starts: Tensor, settings) -> Tensor:
    """`medsec.inversion.attacks.invert` with the attack ``ig``, written as a loop; from the same starting points."""
    found, n = [], settings.iterations
    model = view.model
    weights = list(model.parameters())
    for v, start in enumerate(starts):
        x = start.clone().requires_grad_()
        sent = [g[v] for g in view.gradients]
        optimizer = torch.optim.Adam([x], settings.lr)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [n * 3 // 8 + 1, n * 5 // 8 + 1, n * 7 // 8 + 1])
        for _ in range(n):
            mine = torch.autograd.grad(F.cross_entropy(model(x), labels[v]), weights, create_graph=True)
            loss = inversion.distance("ig", mine, sent) + settings.tv * inversion.total_variation(x)
            (x.grad,) = torch.autograd.grad(loss, x)
            x.grad.sign_()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                x.clamp_(0, 1)
        found.append(x.detach())
    return torch.stack(found)


def timed(call) -> tuple[float, Tensor]:
    start = time.perf_counter()
    found = call()
    return (time.perf_counter() - start) / VICTIMS, found


def main() -> None:
    torch.set_num_threads(1)
    p = params.load()
    settings = p.inversion.attack.model_copy(update={"done": 0.0})  # nobody stops early: the same work for all
    size = p.cohorts.phantom.size
    drawn = phantom.render(range(VICTIMS), [k % 2 for k in range(VICTIMS)], seed=p.cohorts.phantom.seed, size=size)
    x = torch.from_numpy(drawn.images).float()[:, None, None] / 255
    y = (torch.arange(VICTIMS) % 2)[:, None]
    model: nn.Module = convnet.new(size, 1, 2, width=p.inversion.federation.width, seed=0)
    sent = [convnet.gradients(model, a, b) for a, b in zip(x, y, strict=True)]
    view = inversion.View(model, [torch.stack(part) for part in zip(*sent, strict=True)])
    starts = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))

    def ours(together: int) -> Tensor:
        chosen = settings.model_copy(update={"together": together})
        return inversion.invert([view], y, tuple(x.shape[2:]), attack="ig", settings=chosen, seed=0).images

    ways = {
        "together": lambda: ours(VICTIMS),
        "one by one": lambda: ours(1),
        "plain loop": lambda: plain_loop(view, y, starts, settings),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    psnr = {}
    for _ in range(REPEATS):
        for name, call in ways.items():
            spent, found = timed(call)
            seconds[name].append(spent)
            psnr[name] = float(reconstruction.psnr(found[:, 0].numpy(), x[:, 0].numpy()).mean())
    median = {name: statistics.median(each) for name, each in seconds.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(each, seconds["together"], strict=True))
        for name, each in seconds.items()
    }
    result = {
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "victims": VICTIMS,
        "iterations": settings.iterations,
        "seconds_a_victim": {name: round(value, 3) for name, value in median.items()},
        "times_slower_than_together": {name: round(value, 2) for name, value in ratios.items()},
        "psnr": {name: round(value, 1) for name, value in psnr.items()},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
