"""Without a GPU at hand: on PyTorch's fake tensors, which know their device and refuse to mix two, a step trains on CUDA."""

import numpy as np
import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments import params
from medsec.backdoor import gan as fedgan
from medsec.backdoor import triggers
from medsec.core import parallel, paths
from medsec.core.errors import InputError
from medsec.evidence import record
from medsec.federated import aggregators, rounds
from medsec.nets import fit as classifier
from medsec.nets import models

QUICK = params.load()


@pytest.fixture
def fake():
    with FakeTensorMode() as mode:
        yield mode


@pytest.fixture
def images(fake):
    return torch.rand(64, 1, 28, 28).to("cuda"), (torch.arange(64) % 2).to("cuda")


def test_fake_devices_do_not_mix(images):
    """The positive control: what these tests are there to find is found."""
    with pytest.raises(Exception, match=r"(?i)device"):
        images[0] + torch.rand(64, 1, 28, 28)


@pytest.mark.parametrize("kind", triggers.KINDS)
def test_triggers(images, kind):
    trigger = triggers.make_trigger(kind, image_size=28, channels=1)
    if kind != "moving":  # whose places are read as numbers, which fake tensors have not
        assert triggers.stamp(trigger, images[0]).device.type == "cuda"
    assert triggers.score(trigger, images[0]).device.type == "cuda"


def test_gan_epoch_and_drawing(images, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # autograd's engine wants a real GPU
    (x, y), rng = images, torch.Generator().manual_seed(0)
    with torch.device("cuda"):  # a fake model cannot be moved, but it can be born there
        g, d = models.Generator(28, 1, 2), models.Discriminator(28, 1, 2)
    optimizers = [torch.optim.Adam(net.parameters(), fused=True) for net in (g, d)]
    client = fedgan.GANClient(0, x, y, torch.zeros(64, dtype=torch.bool), g, d, *optimizers)
    losses = fedgan._epoch(client, QUICK.fedgan.gan, rng)
    assert [loss.device.type for loss in losses] == ["cuda", "cuda"]
    drawn, labels = fedgan.synthesise(g.eval(), 10, seed=0)
    assert (drawn.device.type, labels.device.type) == ("cuda", "cuda")
    state = {f"generator.{name}": value for name, value in g.state_dict().items()}
    # The server works on the CPU, in NumPy, which knows no fake tensors; what it found goes back to where the state was.
    monkeypatch.setattr(torch.Tensor, "numpy", lambda value: np.zeros(value.shape, str(value.dtype).split(".")[1]))
    mean, _ = aggregators.fedavg([rounds.Update(i, state, 1) for i in range(2)])
    assert {value.device.type for value in mean.values()} == {"cuda"}


def test_classifier(images):
    with torch.device("cuda"):
        model = models.SmallResNet(1, 2)
    assert classifier.predict(model, images[0]).device.type == "cuda"


def test_a_missing_gpu_is_named_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parallel.device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="device: cuda, but PyTorch finds no CUDA GPU"):
        parallel.device("cuda")


def test_records_of_a_gpu_have_their_own_folder():
    gpu = params.load("full-gpu")
    assert record.place("phantom", QUICK).name == "phantom"
    assert record.place("phantom", gpu).name == "phantom-gpu"
    assert set(params.load("full").seeds.evaluation) <= set(gpu.seeds.evaluation)


def test_what_the_full_profile_sets_the_one_for_a_gpu_sets_as_well():
    """A profile is laid over params.yaml alone: what is missing would be as small as in the quick one."""

    def keys(tree, at=()):
        return {
            path for key, v in tree.items() for path in (keys(v, (*at, key)) if isinstance(v, dict) else {(*at, key)})
        }

    full, gpu = (yaml.safe_load((paths.PROFILES / f"{name}.yaml").read_text()) for name in ("full", "full-gpu"))
    assert keys(full) <= keys(gpu)
