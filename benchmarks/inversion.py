"""Gradient inversion: ours, `breaching`, and a plain loop, on the same victims, network, loss, iterations and starting points.

``make bench`` writes ``benchmarks/results.csv``, for one victim and for eight. ``medsec`` is `medsec.inversion.attacks`, all
victims at once; ``medsec, one by one`` the same code, one at a time; ``plain loop`` is most published code:
`torch.autograd.grad` with ``create_graph`` and `torch.optim.Adam`. breaching attacks one victim at a time; its total
variation, which is written for three channels, is told that there is one. *to 30 dB*: the shortest of `SCHEDULES` whose mean
PSNR is 30 dB or more, in iterations.
"""

import functools
import logging
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import breaching
import torch
import torch.nn.functional as F
from common import OURS, compared, one_thread, write
from torch import Tensor, nn

from experiments import params
from medphantom import chest as phantom
from medsec.inversion import attacks as inversion
from medsec.inversion import scores as reconstruction
from medsec.nets import convnet

VICTIMS, SCHEDULES, GOAL = (1, 8), (25, 50, 75, 100), 30.0
PLAIN, PEER = "plain loop", "breaching"


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


def peer(view: inversion.View, labels: Tensor, starts: Tensor, settings) -> Tensor:
    """The attack of Geiping et al. (2020) as `breaching` has it."""
    cfg = breaching.get_attack_config("invertinggradients")
    cfg.optim.max_iterations, cfg.optim.callback, cfg.optim.step_size = settings.iterations, 10**6, settings.lr
    cfg.regularization.total_variation.scale = settings.tv
    shape = tuple(starts.shape[2:])
    metadata = SimpleNamespace(shape=shape, modality="vision", classes=2)
    attacker = breaching.attacks.prepare_attack(
        view.model, nn.CrossEntropyLoss(), cfg, {"device": torch.device("cpu"), "dtype": torch.float}
    )
    for each in attacker.regularizers:
        each.initialize(None)
        each.groups, each.weight = shape[0], each.weight[: 2 * shape[0]]
        each.initialize = lambda *_: None
    payload = [
        {
            "parameters": [p.detach() for p in view.model.parameters()],
            "buffers": list(view.model.buffers()),
            "metadata": metadata,
        }
    ]
    found = []
    for v, start in enumerate(starts):
        about = {"num_data_points": len(start), "labels": labels[v], "local_hyperparams": None}
        sent = [{"gradients": [g[v] for g in view.gradients], "buffers": None, "metadata": about}]
        answer, _ = attacker.reconstruct(payload, sent, {}, initial_data=start)
        found.append(answer["data"].detach())
    return torch.stack(found)


def case(victims: int) -> tuple[inversion.View, Tensor, Tensor, Tensor]:
    """What the server has of some drawn radiographs, one a batch; the images, labels and starting points."""
    p = params.load()
    size = p.cohorts.phantom.size
    drawn = phantom.render(range(victims), [k % 2 for k in range(victims)], seed=p.cohorts.phantom.seed, size=size)
    x, y = torch.from_numpy(drawn.images).float()[:, None, None] / 255, (torch.arange(victims) % 2)[:, None]
    model = convnet.new(size, 1, 2, width=p.inversion.federation.width, seed=0)
    sent = [convnet.gradients(model, a, b) for a, b in zip(x, y, strict=True)]
    view = inversion.View(model, [torch.stack(part) for part in zip(*sent, strict=True)])
    return view, x, y, torch.rand(x.shape, generator=torch.Generator().manual_seed(0))


def ways(victims: int, iterations: int) -> tuple[dict[str, Callable[[], Tensor]], Tensor]:
    """By its name a function without arguments that returns reconstructions (V, 1, 1, S, S); and the images."""
    view, x, y, starts = case(victims)
    # Nobody stops early: the same work for all.
    settings = params.load().inversion.attack.model_copy(update={"done": 0.0, "iterations": iterations})

    def ours(together: int) -> Tensor:
        chosen = settings.model_copy(update={"together": together})
        return inversion.invert([view], y, tuple(x.shape[2:]), attack="ig", settings=chosen, seed=0).images

    found = {OURS: functools.partial(ours, victims), PLAIN: functools.partial(plain_loop, view, y, starts, settings)}
    found[PEER] = functools.partial(peer, view, y, starts, settings)
    if victims > 1:
        found[f"{OURS}, one by one"] = functools.partial(ours, 1)
    return found, x


def quality(call: Callable[[], Tensor], x: Tensor) -> float:
    return float(reconstruction.psnr(call()[:, 0].numpy(), x[:, 0].numpy()).mean())


def main() -> None:
    one_thread()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    lines = []
    for victims in VICTIMS:
        needed: dict[str, int] = {}
        for n in SCHEDULES:
            calls, x = ways(victims, n)
            reached = {name: quality(call, x) for name, call in calls.items()}
            for name, psnr in reached.items():
                if psnr >= GOAL:
                    needed.setdefault(name, n)
        results = {
            name: f"{psnr:.1f} dB; {GOAL:.0f} dB in {needed.get(name, 'more than ' + str(n))} iterations"
            for name, psnr in reached.items()
        }
        lines += compared(f"{victims} victim{'s' * (victims > 1)}, {n} iterations", calls, results)
    write("inversion", lines, ("breaching",))


if __name__ == "__main__":
    main()
