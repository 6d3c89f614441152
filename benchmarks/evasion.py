"""Attacks on a classifier: ours and those of three libraries, on the same network and images, with the same settings.

``make bench`` runs it in an environment of its own and it writes ``benchmarks/results.csv``. The network is the undefended one
of notebook 04, attacked on the notebook's images. Beside the seconds stands what the attack achieved: the share of right
answers that stay right (lower is a stronger attack) and the median length of the changes that turned one. A time counts only
beside an equal result. Carlini-Wagner is not ours: notebook 04 calls the toolbox, so that there is no row of medsec.
"""

from collections.abc import Callable

import foolbox
import numpy as np
import torch
import torchattacks
from art.attacks.evasion import CarliniL2Method, DeepFool, FastGradientMethod, ProjectedGradientDescent
from common import OURS, compared, one_thread, write
from torch import Tensor

from experiments import params
from experiments.adversarial_pruning_defense import arms
from medsec.evasion import attacks, libraries
from medsec.nets import fit

IMAGES = 24  # the toolbox attacks one after the other
STEPS, STEP = 20, 0.25
SEARCHES, ITERATIONS, LR = 6, 100, 1e-2


def calls(model: torch.nn.Module, x: Tensor, y: Tensor, eps: float, overshoot: float, steps: int) -> dict[str, dict]:
    """By attack and library a function without arguments that returns adversarial examples."""
    box = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    art = libraries.oracle(model, tuple(x.shape[1:]), int(y.max()) + 1)
    generator = torch.Generator().manual_seed(0)
    whole = {"batch_size": len(x), "verbose": False}

    def fb(attack, epsilons) -> Callable[[], Tensor]:
        return lambda: attack(box, x, y, epsilons=epsilons)[1]

    def toolbox(attack) -> Callable[[], Tensor]:
        return lambda: torch.from_numpy(attack.generate(x.numpy(), np.eye(int(y.max()) + 1, dtype=np.float32)[y]))

    def ta(attack) -> Callable[[], Tensor]:
        return lambda: attack(x, y)

    pgd = {"steps": STEPS, "step": STEP}
    return {
        "FGSM": {
            OURS: lambda: attacks.fgsm(model, x, y, eps),
            "foolbox": fb(foolbox.attacks.FGSM(), eps),
            "torchattacks": ta(torchattacks.FGSM(model, eps=eps)),
            "ART": toolbox(FastGradientMethod(art, eps=eps, batch_size=len(x))),
        },
        "PGD-20": {
            OURS: lambda: attacks.pgd(model, x, y, eps, generator, **pgd, stop=True),
            f"{OURS}, every step": lambda: attacks.pgd(model, x, y, eps, generator, **pgd),
            "foolbox": fb(foolbox.attacks.LinfPGD(steps=STEPS, rel_stepsize=STEP, random_start=True), eps),
            "torchattacks": ta(torchattacks.PGD(model, eps=eps, alpha=STEP * eps, steps=STEPS, random_start=True)),
            "ART": toolbox(
                ProjectedGradientDescent(
                    art,
                    eps=eps,
                    eps_step=STEP * eps,
                    max_iter=STEPS,
                    num_random_init=1,
                    batch_size=len(x),
                    verbose=False,
                )
            ),
        },
        "DeepFool, l2": {
            OURS: lambda: attacks.deepfool(model, x, y, norm="l2", steps=steps, overshoot=overshoot),
            "foolbox": fb(foolbox.attacks.L2DeepFoolAttack(steps=steps, overshoot=overshoot, loss="logits"), None),
            "torchattacks": ta(torchattacks.DeepFool(model, steps=steps, overshoot=overshoot)),
            "ART": toolbox(DeepFool(art, max_iter=steps, epsilon=overshoot, nb_grads=int(y.max()) + 1, **whole)),
        },
        "Carlini-Wagner, l2": {
            "foolbox": fb(
                foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=SEARCHES, steps=ITERATIONS, stepsize=LR), None
            ),
            "ART": toolbox(
                CarliniL2Method(art, learning_rate=LR, binary_search_steps=SEARCHES, max_iter=ITERATIONS, **whole)
            ),
        },
    }


def achieved(model: torch.nn.Module, x: Tensor, y: Tensor, x_adv: Tensor) -> str:
    """What an attack left right of the images that were right, and how far it went for the others."""
    right = fit.predict(model, x).argmax(1) == y
    left = right & (fit.predict(model, x_adv.detach().float()).argmax(1) == y)
    length = (x_adv - x).flatten(1).norm(dim=1)[right & ~left]
    middle = f"median l2 {float(length.median()):.3f}" if len(length) else "none turned"
    return f"{float(left.sum() / right.sum()):.3f} still right, {middle}"


def main() -> None:
    one_thread()
    p = params.load()
    setup = arms.prepare("phantom", p)
    model, eps = arms.network(setup, "base", 0), p.evasion.eps / 255
    x, y = (part[:IMAGES] for part in setup.splits["test"])
    how, lines = p.evasion.attacks, []
    for attack, libraries_ in calls(model, x, y, eps, how.overshoot, how.deepfool_steps).items():
        found = {name: achieved(model, x, y, call()) for name, call in libraries_.items()}
        lines += compared(f"{attack}, {len(x)} images", libraries_, found)
    write("evasion", lines, ("foolbox", "torchattacks", "adversarial-robustness-toolbox"))


if __name__ == "__main__":
    main()
