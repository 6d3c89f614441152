"""A federation that repeats itself, branches and is attacked exactly as it says; then whole cells, end to end."""

import math
import random
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from joblib.externals.loky import get_reusable_executor

from experiments import params as parameters
from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.backdoor_fedgan import drawing
from experiments.backdoor_fedgan import record as fedgan_record
from medsec import data
from medsec.backdoor import gan as fedgan
from medsec.backdoor import recipes, triggers
from medsec.core import parallel, paths
from medsec.core.errors import InputError
from medsec.core.settings import FedGANParams, ProjectionGAN, WassersteinGAN
from medsec.evidence import cells, tables
from medsec.federated import aggregators
from medsec.federated.rounds import NoQuorum, scale_update
from medsec.nets import fit as classifier
from medsec.nets.models import Critic, ProjectionDiscriminator, UpGenerator, doublings

BASE = {
    "n_clients": 3,
    "malicious": [0],
    "partition": "iid",
    "dirichlet_alpha": 0.5,
    "images_per_client": 24,
    "rounds": 3,
    "average": "generator",
    "gan": {"z_dim": 4, "width": 4, "lr_g": 2e-3, "lr_d": 1.5e-3, "beta1": 0.5, "batch": 8, "decay_after": 0.34},
    "trigger": {"kind": "checker", "size": 4, "opacity": 0.2},
    "poison": {"ratio": 1.0, "label": None, "boost": 2.0, "boost_after": 0.5},
    "measure": {
        "synthetic": 100,
        "threshold_fpr": 0.05,
        "extractor_epochs": 1,
        "downstream_epochs": 1,
        "probe": 16,
    },
}
SIZES = (24, 8, 17)


def params_of(**change):
    return FedGANParams.model_validate(parameters.merge(BASE, change))


def images_of(sizes=SIZES, channels=1, classes=2):
    rng = torch.Generator().manual_seed(0)
    images = [torch.rand(n, channels, 28, 28, generator=rng) for n in sizes]
    return images, [torch.arange(n) % classes for n in sizes]


def trigger_of(kind="checker"):
    return triggers.make_trigger(kind, image_size=28, channels=1)


def federation_of(seed=0, attack=True, sizes=SIZES, **change):
    images, labels = images_of(sizes)
    return fedgan.new_federation(images, labels, 2, params_of(**change), seed, trigger_of() if attack else None)


def content(federation):
    """Everything that training changes, as tensors by name, and the history."""
    found = {f"state {k}": v for k, v in federation.state.items()}
    for c in federation.clients:
        for part in ("generator", "discriminator"):
            found |= {f"{c.index} {part} {k}": v for k, v in getattr(c, part).state_dict().items()}
        for part in ("optimizer_g", "optimizer_d"):
            saved = getattr(c, part).state_dict()
            found |= {f"{c.index} {part} {i} {k}": v for i, s in saved["state"].items() for k, v in s.items()}
            found[f"{c.index} {part} lr"] = torch.tensor(saved["param_groups"][0]["lr"], dtype=torch.float64)
    return found


def same(a, b):
    first, second = content(a), content(b)
    return (
        first.keys() == second.keys()
        and all(torch.equal(first[k], second[k]) for k in first)
        and (a.round, a.history) == (b.round, b.history)
    )


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------------- recipes

DRAWS = ProjectionGAN(**BASE["gan"], shift=3, brightness=0.15, contrast=0.2)


def drawing_federation(seed=0, average="both"):
    images, labels = images_of()
    settings = params_of(average=average).model_copy(update={"gan": DRAWS})
    return fedgan.new_federation(images, labels, 2, settings, seed, trigger_of())


@pytest.mark.parametrize("average", ["generator", "both"])
def test_the_gan_that_draws_repeats_itself_and_is_another(average):
    first, second, other = (fedgan.run(drawing_federation(seed, average)) for seed in (3, 3, 4))
    assert same(first, second)
    assert not same(first, other)
    assert {k.split(".")[0] for k in first.state} == (
        {"generator"} if average == "generator" else {"generator", "discriminator"}
    )
    assert isinstance(first.generator(), UpGenerator)
    assert isinstance(first.clients[0].discriminator, ProjectionDiscriminator)
    start = drawing_federation(3, average)
    assert not any(torch.equal(first.state[k], start.state[k]) for k in first.state if k.endswith("weight"))


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (28, 3), (32, 1), (64, 3)])
def test_the_networks_that_draw(size, channels):
    g, d, y = (
        UpGenerator(size, channels, 3, 8, 4),
        ProjectionDiscriminator(size, channels, 3, 4),
        torch.tensor([0, 2, 1, 1]),
    )
    drawn = g(torch.randn(4, 8), y)
    assert drawn.shape == (4, channels, size, size)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert d(drawn, y).shape == (4,)
    assert not torch.equal(d(drawn, y), d(drawn, y.flip(0)))


def test_spectral_norms_are_the_largest_singular_values():
    d = ProjectionDiscriminator(28, 1, 2, 4)
    for _ in range(200):  # one power iteration each
        d(torch.rand(2, 1, 28, 28), torch.tensor([0, 1]))
    layers = [m for m in d.modules() if hasattr(m, "parametrizations")]
    assert len(layers) == doublings(28) + 2
    for layer in layers:
        raw = layer.parametrizations.weight.original.detach()
        largest = torch.linalg.svdvals(raw.flatten(1))[0]
        torch.testing.assert_close(layer.weight.detach(), raw / largest, rtol=1e-3, atol=1e-4)


def test_hinge_losses_by_hand():
    def d(images, y):
        return images.flatten(1).sum(1) + 0 * y

    real, fake, y = torch.tensor([[2.0], [0.5]]), torch.tensor([[-3.0], [1.0]]), torch.zeros(2)
    assert recipes.hinge_d(d, real, fake, y).item() == (0 + 0.5) / 2 + (0 + 2) / 2
    assert recipes.score_g(d, fake, y).item() == 1.0


REGULARISED = WassersteinGAN(z_dim=8, width=4, lr_g=1e-3, lr_d=1e-3, batch=8, decay_after=0.4, penalty=10)


def test_the_gradient_penalty_is_the_slope_between_the_images():
    """Against finite differences, point by point, with the weights that the released code draws (normal ones)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        d = Critic(28, 1, 2, 4).double()
        real, fake, y = (
            torch.rand(3, 1, 28, 28, dtype=torch.double),
            torch.rand(3, 1, 28, 28, dtype=torch.double),
            torch.tensor([0, 1, 1]),
        )
    loss = recipes.wasserstein_d(d, real, fake, y, REGULARISED, torch.Generator().manual_seed(5))
    share = torch.randn(3, 1, 1, 1, generator=torch.Generator().manual_seed(5))
    lengths = []
    for i in range(3):
        point = share[i] * real[i] + (1 - share[i]) * fake[i]
        slope = torch.zeros(28 * 28, dtype=torch.double)
        with torch.no_grad():
            for k in range(28 * 28):
                step = torch.zeros(28 * 28, dtype=torch.double)
                step[k] = 1e-6
                near = torch.stack([point + step.view(1, 28, 28), point - step.view(1, 28, 28)])
                up, down = d(near, y[i].repeat(2))
                slope[k] = (up - down) / 2e-6
        lengths.append(slope.norm() / 2)  # by images in [-1, 1]
    penalty = (torch.stack(lengths) - 1).square().mean()
    with torch.no_grad():
        expected = d(fake, y).mean() - d(real, y).mean() + 10 * penalty
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_critic_judges_each_image_by_itself():
    d, x, y = Critic(32, 1, 2, 4).train(), torch.rand(4, 1, 32, 32), torch.tensor([0, 1, 0, 1])
    torch.testing.assert_close(d(x, y)[:1], d(x[:1], y[:1]))


def test_a_regularised_federation_trains_and_repeats():
    params = FedGANParams.model_validate(BASE | {"n_clients": 2}).model_copy(update={"gan": REGULARISED})
    images = [torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    start, first, second = (fedgan.new_federation(images, [torch.arange(16) % 2] * 2, 2, params, 3) for _ in range(3))
    fedgan.run(first)
    fedgan.run(second)
    assert all(torch.equal(v, second.state[k]) for k, v in first.state.items())
    assert not all(torch.equal(v, start.state[k]) for k, v in first.state.items())
    assert {type(client.optimizer_d) for client in first.clients} == {torch.optim.RMSprop}


def test_augmentation_by_hand_and_its_gradient():
    images, still = torch.rand(6, 2, 8, 8), DRAWS.model_copy(update={"shift": 0, "brightness": 0.0, "contrast": 0.0})
    rng = torch.Generator().manual_seed(1)
    torch.testing.assert_close(recipes.augmented(images, still, rng), images)

    moved = recipes.augmented(images, still.model_copy(update={"shift": 2}), rng)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    for image, found in zip(padded, moved, strict=True):
        windows = [image[:, row : row + 8, column : column + 8] for row in range(5) for column in range(5)]
        assert any(torch.allclose(found, window) for window in windows)

    brighter = recipes.augmented(images, still.model_copy(update={"brightness": 0.15}), rng) - images
    torch.testing.assert_close(brighter, brighter[:, :1, :1, :1].expand_as(brighter), atol=1e-6, rtol=0)
    assert 0 < brighter.abs().max() <= 0.15
    steeper = recipes.augmented(images, still.model_copy(update={"contrast": 0.2}), rng)
    factor = steeper.flatten(1).std(1) / images.flatten(1).std(1)
    torch.testing.assert_close(steeper.mean((1, 2, 3)), images.mean((1, 2, 3)))
    assert ((factor > 0.79) & (factor < 1.21)).all()

    x = images.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: recipes.augmented(x, DRAWS, torch.Generator().manual_seed(2)).double(), (x,)
    )


# ------------------------------------------------------------------------------------------------------ reproducibility


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first, second, other = (fedgan.run(federation_of(seed)) for seed in (3, 3, 4))
    assert first.round == 3
    assert same(first, second)
    different = [
        k for k, v in content(first).items() if v.is_floating_point() and not torch.equal(v, content(other)[k])
    ]
    assert {k.split()[1] for k in different if not k.startswith("state")} >= {"generator", "discriminator"}
    assert any(k.startswith("state") for k in different)


def test_the_result_does_not_depend_on_how_the_rounds_are_called():
    whole, parts = federation_of(), federation_of()
    fedgan.run(whole)
    for until in (1, 2, 3):
        torch.rand(5)
        fedgan.run(parts, until)
    assert same(whole, parts)
    assert same(whole, fedgan.run(parts)), "a finished federation goes on"


def test_no_global_random_stream_is_touched():
    def streams():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    before = streams()
    federation = federation_of()
    assert streams() == before
    fedgan.run(federation)
    fedgan.run(fedgan.branch(federation_of(), 2.0), 1)
    fedgan.synthesise(federation.generator(), 3, 0)
    assert streams() == before


def test_clients_start_from_the_same_networks():
    federation = federation_of(attack=False)
    first = federation.clients[0]
    for client in federation.clients:
        assert states_equal(client.generator.state_dict(), first.generator.state_dict())
        assert states_equal(client.discriminator.state_dict(), first.discriminator.state_dict())
    assert states_equal(federation.state, {f"generator.{k}": v for k, v in first.generator.state_dict().items()})
    # What one client trains is not another's.
    federation.clients[1].generator.up[-1].weight.data += 1
    assert states_equal(federation.generator().state_dict(), first.generator.state_dict())


def test_labels_and_losses_enter_the_history():
    federation = fedgan.run(federation_of())
    assert [(h["round"], h["client"]) for h in federation.history] == [(t, c) for t in (1, 2, 3) for c in range(3)]
    for entry in federation.history:
        assert set(entry) == {"round", "client", "loss_g", "loss_d", "last_loss_g"}
        assert all(math.isfinite(entry[k]) and entry[k] > 0 for k in ("loss_g", "loss_d", "last_loss_g"))


# ------------------------------------------------------------------------------------------------------------ poisoning


def test_only_the_malicious_clients_images_differ():
    clean, attacked = federation_of(attack=False), federation_of()
    assert [c.malicious for c in clean.clients] == [False] * 3
    assert [c.malicious for c in attacked.clients] == [True, False, False]
    for a, b in zip(clean.clients[1:], attacked.clients[1:], strict=True):
        assert torch.equal(a.images, b.images)
    assert torch.equal(attacked.clients[0].images, triggers.stamp(trigger_of(), clean.clients[0].images))
    assert states_equal(clean.state, attacked.state)
    assert all(torch.equal(c.images, x) for c, x in zip(clean.clients, images_of()[0], strict=True))
    # The honest clients' first round does not know of the attack; the attacker's does.
    fedgan.run(clean, 1)
    fedgan.run(attacked, 1)
    for i, equal in enumerate([False, True, True]):
        a, b = (f.clients[i].generator.state_dict() for f in (clean, attacked))
        assert states_equal(a, b) == equal
    assert not states_equal(clean.state, attacked.state)


@pytest.mark.parametrize("malicious", [[], [1], [0, 2], [0, 1, 2]])
def test_which_clients_are_malicious(malicious):
    federation = federation_of(malicious=malicious)
    assert [c.index for c in federation.clients if c.malicious] == malicious


@pytest.mark.parametrize("kind", triggers.KINDS)
@pytest.mark.parametrize("label", [None, 0, 1])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.01])
def test_poison_stamps_a_share_of_one_class_or_all(kind, label, ratio):
    (images,), (labels,) = images_of((30,))
    labels = (torch.arange(30) % 3 == 0).long()  # 20 of class 0, 10 of class 1
    before = images.clone()
    trigger = trigger_of(kind)
    poisoned, mask = fedgan.poison(images, labels, trigger, ratio=ratio, label=label, seed=5)
    eligible = {None: 30, 0: 20, 1: 10}[label]
    assert int(mask.sum()) == math.ceil(Fraction(str(ratio)) * eligible)
    assert label is None or (labels[mask] == label).all()
    assert torch.equal(images, before)
    assert torch.equal(poisoned[~mask], images[~mask])
    assert (poisoned[mask] != images[mask]).flatten(1).any(1).all()
    if kind in ("checker", "grid", "blended"):
        assert torch.equal(poisoned[mask], triggers.stamp(trigger, images[mask]))
    else:
        assert triggers.score(trigger, poisoned[mask]).min() > 0.999
    again, same_mask = fedgan.poison(images, labels, trigger, ratio=ratio, label=label, seed=5)
    assert torch.equal(again, poisoned)
    assert torch.equal(same_mask, mask)
    if ratio == 0.5:
        assert not torch.equal(mask, fedgan.poison(images, labels, trigger, ratio=ratio, label=label, seed=6)[1])


@pytest.mark.parametrize(
    ("ratio", "n"), [(0.07, 100), (0.14, 50), (0.55, 100), (0.29, 100), (0.1, 30), (1 / 3, 30), (0.2, 15), (0.001, 5)]
)
def test_the_number_of_poisoned_images_is_exact(ratio, n):
    """The share as it is written, rounded up: 7 % of 100 images are 7."""
    images, labels = torch.zeros(n, 1, 28, 28), torch.zeros(n, dtype=torch.long)
    _, mask = fedgan.poison(images, labels, trigger_of(), ratio=ratio, label=None, seed=0)
    assert int(mask.sum()) == math.ceil(Fraction(str(ratio)) * n)


def test_poisoning_follows_the_parameters():
    federation = federation_of(poison={"ratio": 0.5, "label": 1})
    attacker = federation.clients[0]
    assert int(attacker.poisoned.sum()) == 6
    assert (attacker.labels[attacker.poisoned] == 1).all()


def test_a_poisoned_class_that_the_attacker_lacks():
    images, labels = images_of()
    labels[0][:] = 0
    with pytest.raises(InputError, match=r"poison\.label 1: the malicious client holds no image"):
        fedgan.new_federation(images, labels, 2, params_of(poison={"label": 1}), 0, trigger_of())


@pytest.mark.parametrize("place", [0, 2])
def test_a_client_with_one_image(place):
    sizes = [8, 8, 8]
    sizes[place] = 1
    with pytest.raises(InputError, match=f"client {place} holds 1 images"):
        federation_of(sizes=sizes)


# ------------------------------------------------------------------------------------------------------------- averaging


def averaged(federation, part):
    """Mean of the clients' networks, weighted by their images, in float64 and name by name."""
    weights = np.array([len(c.images) for c in federation.clients]) / sum(len(c.images) for c in federation.clients)
    states = [getattr(c, part).state_dict() for c in federation.clients]
    return {
        k: sum(w * s[k].double() for w, s in zip(weights, states, strict=True)).round(decimals=12) for k in states[0]
    }


def test_only_the_generator_is_averaged():
    federation = fedgan.run(federation_of(), 2)
    assert federation.state
    assert all(name.startswith("generator.") for name in federation.state)
    expected = averaged(federation, "generator")
    assert {f"generator.{k}" for k in expected} == set(federation.state)
    for name, value in expected.items():
        got = federation.state[f"generator.{name}"]
        wanted = value if got.is_floating_point() else value.round()
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-7)
    discriminators = [c.discriminator.state_dict() for c in federation.clients]
    for i in range(3):
        for j in range(i):
            assert not torch.equal(discriminators[i]["net.0.weight"], discriminators[j]["net.0.weight"])


def test_a_discriminator_never_leaves_its_hospital():
    """With one step a round, a client's discriminator depends on the others through the generator alone."""
    alone = fedgan.run(federation_of(attack=False, rounds=1))
    twin = federation_of(attack=False, rounds=1)
    twin.clients[2].images = torch.zeros_like(twin.clients[2].images)
    fedgan.run(twin)
    assert states_equal(alone.clients[1].discriminator.state_dict(), twin.clients[1].discriminator.state_dict())
    assert not states_equal(alone.state, twin.state)


def test_averaging_both():
    federation = fedgan.run(federation_of(average="both"), 2)
    assert {name.split(".")[0] for name in federation.state} == {"generator", "discriminator"}
    for part in ("generator", "discriminator"):
        for name, value in averaged(federation, part).items():
            got = federation.state[f"{part}.{name}"]
            wanted = value if got.is_floating_point() else value.round()
            torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-7)
    # At the beginning of the next round every discriminator is the averaged one.
    seen = []
    original = fedgan._load_shared

    def spy(client, state):
        original(client, state)
        seen.append({k: v.clone() for k, v in client.discriminator.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedgan, "_load_shared", spy)
        server = {k.removeprefix("discriminator."): v.clone() for k, v in federation.state.items() if "discrim" in k}
        fedgan.run(federation, 3)
    assert len(seen) == 3
    assert all(states_equal(state, server) for state in seen)


def test_every_client_starts_a_round_from_the_averaged_generator():
    federation = fedgan.run(federation_of(), 1)
    before = {k: v.clone() for k, v in federation.state.items()}
    client = federation.clients[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", lambda self: None)
        update = fedgan.train_client(client, federation.state, federation, 1)
    trained = [k for k in before if "running" not in k and "num_batches" not in k]
    assert trained
    assert all(torch.equal(update.state[k], before[k]) for k in trained)
    assert (update.client, update.n_samples) == (2, 17)
    assert states_equal(federation.state, before), "training changed the server's state"


def test_optimisers_keep_their_memory():
    federation = fedgan.run(federation_of(), 1)
    for t in (1, 2, 3):
        fedgan.run(federation, t)
        for client, batches in zip(federation.clients, (3, 1, 3), strict=True):  # 24, 8 and 17 = 8 + 8 + 1 images
            used = batches if client.index != 2 else 2  # a batch of one image is left out
            for optimizer in (client.optimizer_g, client.optimizer_d):
                states = list(optimizer.state.values())
                assert states
                assert all(int(s["step"]) == used * t for s in states)
                assert all(float(s["exp_avg_sq"].sum()) > 0 for s in states)


def test_learning_rates_fade():
    federation = federation_of(rounds=4, gan={"decay_after": 0.5})
    rates = []
    fedgan.run(
        federation,
        after_round=lambda f: rates.append(
            [o.param_groups[0]["lr"] for o in (f.clients[1].optimizer_g, f.clients[1].optimizer_d)]
        ),
    )
    np.testing.assert_allclose(rates, np.outer([1, 1, 1, 0.5], [2e-3, 1.5e-3]))
    for decay_from in (4, 9):
        assert [fedgan._fade(t, decay_from, 4) for t in range(4)] == [1.0] * 4


def test_generators_to_draw_from():
    federation = fedgan.run(federation_of(), 1)
    averaged_g, own = federation.generator(), federation.generator(2)
    assert not averaged_g.training
    assert not own.training
    assert states_equal({f"generator.{k}": v for k, v in averaged_g.state_dict().items()}, federation.state)
    assert states_equal(own.state_dict(), federation.clients[2].generator.state_dict())
    assert not states_equal(own.state_dict(), averaged_g.state_dict())
    own.up[-1].weight.data += 1
    averaged_g.up[-1].weight.data += 1
    assert not torch.equal(own.up[-1].weight, federation.clients[2].generator.up[-1].weight)
    assert not torch.equal(averaged_g.up[-1].weight, federation.state["generator.up.0.weight"])


def test_synthesise():
    generator = fedgan.run(federation_of(), 1).generator()
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    images, labels = fedgan.synthesise(generator, 301, 7)
    assert images.shape == (301, 1, 28, 28)
    assert 0 <= images.min() < images.max() <= 1
    assert not images.requires_grad
    assert labels.tolist() == [i % 2 for i in range(301)]
    again, _ = fedgan.synthesise(generator, 301, 7)
    assert torch.equal(images, again)
    assert not torch.equal(images, fedgan.synthesise(generator, 301, 8)[0])
    ones = torch.ones(301, dtype=torch.long)
    asked, given = fedgan.synthesise(generator, 301, 7, ones)
    assert torch.equal(given, ones)
    torch.testing.assert_close(asked[1::2], images[1::2])
    assert (asked[::2] - images[::2]).abs().amax((1, 2, 3)).min() > 0
    assert states_equal(generator.state_dict(), before)


# ------------------------------------------------------------------------------------------------------- boost and branch


def test_scale_update_is_the_published_formula():
    received = {"w": torch.tensor([1.0, 2.0]), "bn.running_var": torch.tensor([1.0, 1.0]), "n": torch.tensor(3)}
    sent = {"w": torch.tensor([1.5, 1.0]), "bn.running_var": torch.tensor([0.2, 2.0]), "n": torch.tensor(5)}
    scaled = scale_update(sent, received, 4.0)
    assert scaled["w"].tolist() == [3.0, -2.0]
    assert scaled["bn.running_var"].tolist() == [0.0, 5.0]
    assert scaled["n"] == 5
    assert sent["w"].tolist() == [1.5, 1.0]
    once = scale_update(sent, received, 1.0)
    for name in sent:
        torch.testing.assert_close(once[name], sent[name])


def collect(federation, until):
    """Run, and return what every client sent: ``sent[round][client]``, with the state it received."""
    sent = {}

    def aggregate(updates, round):
        sent[round] = (federation.state, {u.client: u.state for u in updates})
        return aggregators.fedavg(updates, round)

    fedgan.run(federation, until, aggregate=aggregate)
    return sent


def test_the_boost_begins_when_it_says_and_only_at_the_malicious_client():
    plain, boosted = fedgan.branch(federation_of()), fedgan.branch(federation_of(), 3.0, 1)
    assert [c.boost for c in boosted.clients] == [3.0, 1.0, 1.0]
    honest, attacked = collect(plain, 2), collect(boosted, 2)
    for client in range(3):
        assert states_equal(honest[0][1][client], attacked[0][1][client])
    received, local = honest[1][0], honest[1][1]
    assert states_equal(received, attacked[1][0])
    for client in (1, 2):
        assert states_equal(local[client], attacked[1][1][client])
    clamped = 0
    for name, value in attacked[1][1][0].items():
        if not value.is_floating_point():
            assert torch.equal(value, local[0][name])
            continue
        expected = received[name].double() + 3 * (local[0][name].double() - received[name].double())
        if name.endswith("running_var"):
            clamped += int((expected < 0).sum())
            expected = expected.clamp_min(0)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        if not name.endswith("bias"):  # biases before a normalisation hardly move
            assert not torch.equal(value, local[0][name]), name
    # What the attacker keeps is what it trained, not what it sent.
    kept = boosted.clients[0].generator.state_dict()
    assert states_equal(kept, plain.clients[0].generator.state_dict())


def test_a_branch_is_independent_and_goes_on_like_its_origin():
    origin = fedgan.run(federation_of(), 1)
    branch, frozen = fedgan.branch(origin), fedgan.branch(origin)
    assert same(origin, branch)
    fedgan.run(branch)
    assert same(origin, frozen), "training the branch changed its origin"
    assert not same(origin, branch)
    fedgan.run(origin)
    assert same(origin, branch)
    assert same(fedgan.run(frozen), branch)


def test_a_boosted_branch_leaves_the_origin_as_it_was():
    origin, control = (fedgan.run(federation_of(), 1) for _ in range(2))
    boosted = fedgan.run(fedgan.branch(origin, 4.0, 1))
    assert [c.boost for c in origin.clients] == [1.0] * 3
    assert same(fedgan.run(origin), fedgan.run(control))
    assert not states_equal(boosted.state, origin.state)
    neutral = fedgan.run(fedgan.branch(fedgan.run(federation_of(), 1), 1.0, 1))
    assert same(neutral, origin), "a factor of 1 is no boost"


def test_a_clean_branch_has_nobody_to_boost():
    boosted = fedgan.branch(federation_of(attack=False), 5.0)
    assert [c.boost for c in boosted.clients] == [1.0] * 3


# -------------------------------------------------------------------------------------------------------- broken clients


@pytest.mark.parametrize("bad", [(1,), (0, 1, 2)])
def test_a_client_that_sends_nan(bad, monkeypatch):
    """Two of three are enough; where nobody is left, the federation stays as it was after the last round."""
    original = fedgan.train_client

    def train_client(client, state, federation, round):
        update = original(client, state, federation, round)
        if client.index in bad and round == 1:
            name = "generator.up.0.weight"
            update.state[name] = torch.full_like(update.state[name], float("nan"))
        return update

    monkeypatch.setattr(fedgan, "train_client", train_client)
    federation = federation_of()
    states = [federation.state]
    if len(bad) == 3:
        with pytest.raises(NoQuorum, match="round 1: 0 of 3 updates usable, need 2; client 0: generator"):
            fedgan.run(federation, after_round=lambda f: states.append(f.state))
        assert (federation.round, len(states)) == (1, 2)
        assert states_equal(federation.state, states[1])
        return
    fedgan.run(federation, after_round=lambda f: states.append(f.state))
    assert federation.round == 3
    assert all(torch.isfinite(v).all() for v in federation.state.values())
    rejected = [h for h in federation.history if "rejected" in h]
    assert [(h["round"], h["client"]) for h in rejected] == [(2, i) for i in bad]
    assert all("generator.up.0.weight holds NaN" in h["rejected"] for h in rejected)
    # Nothing of what is rejected is used, the reported losses neither.
    assert [h["client"] for h in federation.history if "loss_g" in h] == [0, 1, 2, 0, 2, 0, 1, 2]
    assert not states_equal(states[1], states[2])
    assert not states_equal(states[2], states[3])


def test_a_client_that_stumbles_is_absent_for_a_round_and_strictly_it_ends_the_run(monkeypatch):
    original, stumbled = recipes.F.softplus, []

    def softplus(x):
        weights = federation.clients[0].discriminator.parameters()
        if federation.round == 1 and not stumbled and not any(p.requires_grad for p in weights):
            stumbled.append(True)  # in its generator's step, while its discriminator is frozen
            raise RuntimeError("no\nmemory")
        return original(x)

    monkeypatch.setattr(recipes.F, "softplus", softplus)
    federation = federation_of()
    fedgan.run(federation)
    assert [h for h in federation.history if "absent" in h] == [
        {"round": 2, "client": 0, "absent": "RuntimeError: no memory"}
    ]
    assert [h["client"] for h in federation.history if "loss_g" in h] == [0, 1, 2, 1, 2, 0, 1, 2]
    federation = federation_of()
    stumbled.clear()
    with pytest.raises(RuntimeError, match="memory"):
        fedgan.run(federation, strict=True)


def test_the_others_are_averaged_without_the_broken_one(monkeypatch):
    original = fedgan.train_client

    def train_client(client, state, federation, round):
        update = original(client, state, federation, round)
        if client.index == 1:
            update.state["generator.start.0.bias"][0] = float("inf")
        return update

    monkeypatch.setattr(fedgan, "train_client", train_client)
    federation = fedgan.run(federation_of(), 1)
    weights = {0: 24 / 41, 2: 17 / 41}
    for name, value in federation.state.items():
        if value.is_floating_point():
            parts = [w * federation.clients[i].generator.state_dict()[name[10:]] for i, w in weights.items()]
            torch.testing.assert_close(value, sum(parts), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ end to end

SEED = 0
SMALL = {
    "classifier": {"batch": 32},
    "fedgan": parameters.merge(BASE, {"images_per_client": 12, "rounds": 2}),
}


@pytest.fixture
def tiny(tiny_npz):
    """Function: parameters for a small colour cohort of three classes."""
    file = tiny_npz(classes=3, channels=3, per_class=80)

    def make(**fedgan_change):
        tree = parameters.merge(parameters.load().model_dump(), SMALL)
        tree = parameters.merge(tree, {"cohorts": {"npz": {"path": str(file)}}, "fedgan": fedgan_change})
        return parameters.validate(tree)

    yield make
    fedgan_eval._prepare.cache_clear()


ADDRESS = ["variant", "scenario", "metric", *fedgan_eval.KEYS]
COLUMNS = ["seed", "variant", "scenario", "metric", "value", "n_items", "unit", *fedgan_eval.KEYS]
DESCRIBED = {"trigger_rate", "trigger_ncc", "frechet", "label_accuracy", "downstream_auc"}


def headline(table, **where):
    rows = table[(table[list(fedgan_eval.KEYS)] == "").all(axis=1)]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows


@pytest.fixture
def processes():
    """Worker processes of this test only: they inherit its environment."""
    get_reusable_executor().shutdown(wait=True, kill_workers=True)
    yield
    get_reusable_executor().shutdown(wait=True, kill_workers=True)


def test_cells_end_to_end(tiny, processes):
    params = tiny()
    cells = [("npz", params, SEED, arm) for arm in fedgan_eval.ARMS]
    fresh = [fedgan_eval.run_cell(*cell) for cell in cells]
    clean, attack, controls = (table for table, _ in fresh)

    for table in (clean, attack, controls):
        assert list(table.columns) == COLUMNS
        assert np.isfinite(table["value"]).all()
        assert (table["seed"] == SEED).all()
        assert (table["n_items"] > 0).all()
        assert not table.duplicated(ADDRESS).any()
        assert all(isinstance(cell, str) for key in fedgan_eval.KEYS for cell in table[key])
        assert (table["unit"] == [tables.metrics()[name]["unit"] for name in table["metric"]]).all()
        shares = table[table["unit"].isin(["share", "AUC"]) & ~table["metric"].str.contains("gap|attribution")]
        assert shares["value"].between(0, 1).all()
    assert set(zip(clean["variant"], clean["scenario"], strict=True)) == {("clean", "no_attack")}
    assert set(zip(attack["variant"], attack["scenario"], strict=True)) == {("poison", "attack"), ("boost", "attack")}
    assert set(controls["scenario"]) == {"control"}
    assert {"real", "real_triggered", "real_blurred", "real_noisy"} <= set(controls["variant"])

    for table, variant in ((clean, "clean"), (attack, "poison"), (attack, "boost")):
        found = table[table["variant"] == variant]
        assert set(found["metric"]) == DESCRIBED | {*fedgan_eval.PER_CLIENT, "trigger_rate", "d_attribution"}
        assert set(headline(found)["metric"]) >= DESCRIBED | set(fedgan_eval.PER_CLIENT)
        for metric in ("trigger_rate", *fedgan_eval.PER_CLIENT):
            per_round = found[(found["metric"] == metric) & (found["round"] != "")]
            assert set(per_round["round"]) == {"1", "2"}, metric
            assert {"0", "1", "2", "attacker", "others"} <= set(per_round["client"]), metric
    # poison and boost share every round before the boost begins and part afterwards.
    first, second = (
        attack[(attack["variant"] == v) & attack["round"].isin(["1"])].drop(columns="variant").reset_index(drop=True)
        for v in ("poison", "boost")
    )
    assert len(first) > 10
    pd.testing.assert_frame_equal(first, second)
    assert float(headline(attack, variant="poison", metric="frechet")["value"].iloc[0]) != float(
        headline(attack, variant="boost", metric="frechet")["value"].iloc[0]
    )

    # The yardsticks: every stamped image is recognised, real images are closest to the reference.
    rates = headline(controls, metric="trigger_rate").set_index("variant")["value"]
    assert rates["real_triggered"] == 1
    assert rates["real"] <= 0.2
    assert set(headline(controls, variant="real")["metric"]) == DESCRIBED

    pictures = {name: image for _, part in fresh for name, image in part.items()}
    for name in ("clean", "poison", "boost", "real", "real_triggered"):
        assert pictures[name].shape[1:] == (3, 28, 28)
        assert 0 < len(pictures[name]) <= fedgan_eval.GALLERY
        assert 0 <= pictures[name].min() <= pictures[name].max() <= 1
    for name in ("clean", "poison", "boost"):
        assert pictures[f"{name}_attribution"].shape == (2, 28, 28)
        assert np.isfinite(pictures[f"{name}_attribution"]).all()

    # A summary of two "seeds" pairs what can be paired, and each row can be addressed.
    runs = pd.concat([clean, attack, controls])
    runs = pd.concat([runs, runs.assign(seed=SEED + 1, value=runs["value"] + 0.01 * (runs["unit"] != "share"))])
    summary = tables.summarise(runs, fedgan_eval.KEYS, paired_with="clean")
    assert list(summary.columns) == [*tables.SUMMARY, *fedgan_eval.KEYS]
    assert not summary.duplicated(ADDRESS).any()
    assert (summary["n"] == 2).all()
    paired = headline(summary, scenario="minus_clean", metric="frechet").set_index("variant")["value"]
    assert set(paired.index) == {"poison", "boost"}
    for variant, value in paired.items():
        own, base = (
            tables.row(summary, variant=v, scenario=s, metric="frechet")["value"]
            for v, s in ((variant, "attack"), ("clean", "no_attack"))
        )
        assert value == pytest.approx(own - base)
    assert set(summary[summary["scenario"] == "minus_clean"]["variant"]) == {"poison", "boost"}

    # Once more, afresh, in this process and in two others: the same bits.
    fedgan_eval._prepare.cache_clear()
    alone = parallel.run_cells(fedgan_eval.run_cell, cells[1:], processes=1)
    spread = parallel.run_cells(fedgan_eval.run_cell, cells[::-1], processes=2)[::-1]
    for expected, again in ((fresh[1:], alone), (fresh, spread)):
        for (table, images), (table_again, images_again) in zip(expected, again, strict=True):
            pd.testing.assert_frame_equal(table, table_again, check_exact=True)
            assert images.keys() == images_again.keys()
            assert all(np.array_equal(images[name], images_again[name]) for name in images)


@pytest.fixture
def untrained(monkeypatch):
    """Nothing may be trained."""

    def fail(*args, **options):
        raise AssertionError("training began before the error was found")

    monkeypatch.setattr(classifier, "fit", fail)
    monkeypatch.setattr(fedgan, "train_client", fail)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"malicious": [0, 1, 2, 3]}, "4 malicious clients of only 3"),
        ({"malicious": [3]}, "malicious client 3 does not exist"),
        ({"trigger": {"size": 29}}, "trigger of 29 px does not fit"),
        ({"trigger": {"kind": "grid", "size": 28}}, "trigger of 28 px does not fit"),
        ({"poison": {"label": 3}}, r"poison\.label 3: npz has classes 0 to 2"),
        ({"measure": {"threshold_fpr": 0.001}}, "cannot calibrate a rate of 0.001"),
    ],
)
def test_impossible_parameters_are_found_before_any_training(tiny, untrained, change, message):
    with pytest.raises(InputError, match=message):
        fedgan_eval.run_cell("npz", tiny(**change), SEED, "attack")


@pytest.mark.parametrize(
    ("share", "rounds", "start"),
    [(0.4, 20, 8), (0.5, 2, 1), (0.0, 5, 0), (0.29, 100, 29), (0.58, 50, 29), (0.35, 3, 1)],
)
def test_the_boost_begins_after_the_share_of_rounds_as_it_is_written(tiny, share, rounds, start):
    assert start == math.floor(Fraction(str(share)) * rounds)
    assert fedgan_eval.boost_start(tiny(rounds=rounds, poison={"boost_after": share})) == start


def test_an_impossible_partition_is_found_before_any_gan_is_trained(tiny, monkeypatch):
    monkeypatch.setattr(fedgan, "train_client", lambda *a: pytest.fail("training began"))
    with pytest.raises(InputError, match="cohort has no sites"):
        fedgan_eval.run_cell("npz", tiny(partition="style"), SEED, "clean")


def test_a_reference_split_too_small_for_a_distance_is_found_before_any_gan_is_trained(tiny_npz, tiny, monkeypatch):
    """A Fréchet distance of 64 features needs more than 64 images in the reference split."""
    monkeypatch.setattr(fedgan, "train_client", lambda *a: pytest.fail("a GAN was trained in vain"))
    file = tiny_npz(classes=3, channels=3, per_class=40, name="small.npz")
    tree = parameters.merge(tiny().model_dump(), {"cohorts": {"npz": {"path": str(file)}}})
    with pytest.raises(InputError, match="reference"):
        fedgan_eval.run_cell("npz", parameters.validate(tree), SEED, "clean")


def test_harm_shows_where_one_class_carries_the_trigger():
    """The yardstick itself, on real images in the place of synthetic ones: stamped in one class, in all, in none."""
    p = parameters.load()
    measure = p.fedgan.measure.model_copy(update={"extractor_epochs": 1})
    p = p.model_copy(update={"fedgan": p.fedgan.model_copy(update={"measure": measure})})
    setup = drawing.setup_of("phantom", p, p.drawing.label)
    images, labels = (part[::4] for part in setup.splits["client"])
    stamped = triggers.stamp(setup.trigger, images)
    one = torch.where((labels == p.drawing.label)[:, None, None, None], stamped, images)
    found = {}
    for name, x in {"one": one, "all": stamped, "none": images}.items():
        rows = tables.Rows(fedgan_eval.KEYS, SEED, name, "attack")
        drawing._harm_rows(rows, setup, x, labels, SEED)
        found[name] = rows.table().set_index("metric")["value"]
    assert found["one"]["attack_success"] > 0.9
    assert found["one"]["attack_success"] > found["one"]["attack_success_unstamped"] + 0.5
    for name in ("all", "none"):
        assert found[name]["attack_success"] < 0.4, name


@pytest.mark.parametrize("channels", [1, 3])
def test_the_contact_sheet_shows_the_cells_pictures(channels, tmp_path, monkeypatch):
    p = parameters.load()
    cohort = data.load("phantom", p.cohorts)
    monkeypatch.setattr(paths, "records", lambda name: tmp_path)
    fedgan_record.sheet(cohort, p, tmp_path)
    assert fedgan_record.sheet_rows("phantom") == {}, "no cells, no sheet"
    rng = np.random.default_rng(0)
    shown = {name: rng.uniform(size=(drawing.GALLERY, channels, 8, 8)) for name in fedgan_record.SHEET}
    note = dict.fromkeys(cells.NOTE, 0)
    for arm, measured in drawing.ARMS.items():
        names = [name for name in measured if name in shown]
        if not names:
            continue
        cell = cells.Cell(arm, p.seeds.evaluation[0])
        identity = cells.identity(drawing.EXPERIMENT, cohort.fingerprint, p, cell)
        place = cells.place(drawing.EXPERIMENT, "phantom", cell, identity)
        place.parent.mkdir(parents=True, exist_ok=True)
        rows = tables.Rows(fedgan_eval.KEYS, 0, names[0], "control")
        rows.add("frechet", 1.0, 1)
        finished = rows.table(), {name: shown[name] for name in names}
        cells.write(place, finished, note | {"identity": identity})
    fedgan_record.sheet(cohort, p, tmp_path)
    found = fedgan_record.sheet_rows("phantom")
    assert list(found) == list(fedgan_record.SHEET.values())
    for name, label in fedgan_record.SHEET.items():
        np.testing.assert_allclose(found[label] / 255, shown[name][::3], atol=0.002)
