"""Other images and other devices: colour and three classes through every experiment, and a GPU where there is one."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import test_evasion_eval
import test_feddetect_eval
import test_fedgan
import test_inversion_eval
import test_matrix_eval
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments import params
from experiments.adversarial_pruning_defense import cells as evasion
from experiments.adversarial_pruning_defense import figures as evasion_figures
from experiments.backdoor_fedgan import cells as fedgan
from experiments.catalogue import DESIGNS
from experiments.data_and_threats import cells as shift
from experiments.feddetect import cells as feddetect
from experiments.gia_defense import cells as inversion
from experiments.gia_defense import clients as inversion_clients
from experiments.gia_defense import figures as inversion_figures
from experiments.threat_matrix import cells as matrix
from medsec.backdoor import gan, triggers
from medsec.core import parallel, paths
from medsec.core.errors import InputError
from medsec.evidence import record
from medsec.evidence.cells import Cell
from medsec.federated import aggregators, rounds
from medsec.nets import fit as classifier
from medsec.nets import models
from medsec.show import plots

IMAGES = {"client": 96, "public": 72, "reference": 96, "val": 24, "test": 24}
COHORT = {"fundus": {"size": 28, "seed": 7, "images": IMAGES, "grades": 3}}
FEW = {"victims": 8, "attack": {"together": 8}, "attacks": ["ig"], "adaptive": ["known", "purified", "unmasked"]}
SMALL = {  # of each experiment: what makes its own tests small
    shift: {"threats": {"shift_images": 24, "shift_epochs": 1}},
    fedgan: test_fedgan.SMALL,
    feddetect: test_feddetect_eval.SMALL,
    inversion: params.merge(test_inversion_eval.SMALL, {"inversion": FEW}),  # 8 victims: one has a lesion
    evasion: test_evasion_eval.SMALL,
    matrix: params.merge(test_matrix_eval.SMALL, {"matrix": {"federation": {"images_per_client": 24, "rounds": 4}}}),
}
CELLS = [
    (shift, Cell("shift", 0, keys={"site": 0})),
    *((fedgan, Cell(arm, 0)) for arm in ("attack", "clean", "controls")),
    *((feddetect, Cell(arm, 0, variants=feddetect.VARIANTS)) for arm in ("boost_liar", "aware", "blended_trigger")),
    (feddetect, Cell("downstream", 0)),
    *((inversion, Cell("attack", 0, variants=(variant,))) for variant in inversion_clients.VARIANTS),
    (inversion, Cell("attack", 0, keys={"batch": 2, "labels": "inferred"}, variants=("none",))),
    (inversion, Cell("attack", 0, keys={"steps": 2}, variants=("none",))),
    (inversion, Cell("strength", 0, keys={"strength": 1}, variants=("soteria",))),
    (inversion, Cell("rounds", 0, variants=("dp_sgd",), given={"shares": [0.0, 1.0]})),
    *((evasion, Cell("arm", 0, variants=(variant,))) for variant in ("base", "hardened")),
    (evasion, Cell("ramp", 0, variants=("at_ramp",))),
    (evasion, Cell("prune", 0, keys={"prune": 0.5}, variants=("prune",))),
    (matrix, Cell("rows", 0, variants=("none", "hardened", "feddetect+shadow"))),
]


def named(case):
    experiment, cell = case
    return f"{experiment.__name__.split('.')[1]}-{'+'.join(cell.variants[:1])}-{cell.name}"


@pytest.fixture(scope="module", autouse=True)
def _forget():
    yield
    for prepared in (fedgan._prepare, inversion_clients._prepare):
        prepared.cache_clear()


@pytest.mark.parametrize(("experiment", "cell"), CELLS, ids=map(named, CELLS))
def test_an_experiment_runs_on_colour_and_three_classes(experiment, cell):
    tree = params.merge(params.load().model_dump(), SMALL[experiment])
    p = params.validate(params.merge(tree, {"cohorts": COHORT}))
    table, _ = experiment.EXPERIMENT.run("fundus", p, cell)
    assert len(table)
    assert np.isfinite(table["value"]).all()
    if (experiment, cell.variants[:1]) == (inversion, ("none",)) and cell.arm == "attack" and not cell.keys:
        assert {"lesion", "outside"} <= set(table["region"])
    if (experiment, cell.variants) == (evasion, ("hardened",)):
        assert "pointing_game" in set(table["metric"])


def test_a_second_modality_has_headlines_only():
    p = params.load("full")
    for design in DESIGNS.values():
        cells = design.cells("fundus", p)
        assert len({cell.name for cell in cells}) == len(cells)
        assert {cell.seed for cell in cells if not cell.keys} == set(p.seeds.evaluation)
        swept = design.cells("phantom", p)  # notebook 05 has no sweeps: its headline is the whole matrix
        assert len(cells) < len(swept) / 2 or cells == swept == [cell for cell in swept if not cell.keys]
        assert all(cell.keys == {"trigger": "grid", "size": 64} for cell in cells if cell.keys)


def test_a_colour_image_is_drawn_in_colour():
    red = np.zeros((2, 3, 8, 8), dtype=np.float32)
    red[:, 0] = 1
    x, y = torch.from_numpy(red), torch.tensor([0, 1])
    drawn = [
        plots.gallery({"red": red}, ""),
        inversion_figures.changes(red, {"a": red / 2}, None, ""),
        evasion_figures.examples(x, {"a": x}, "", times=1, answers={"a": y}, y=y),
        evasion_figures.looks(x, {"a": x[:, 0]}, None, ""),
    ]
    for fig, _ in drawn:
        image = fig.axes[0].get_images()[0]
        assert np.allclose(np.asarray(image.get_array())[..., :3], [1, 0, 0])
    plt.close("all")


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
    client = gan.GANClient(0, x, y, torch.zeros(64, dtype=torch.bool), g, d, *optimizers)
    losses = gan._epoch(client, QUICK.fedgan.gan, rng)
    assert [loss.device.type for loss in losses] == ["cuda", "cuda"]
    drawn, labels = gan.synthesise(g.eval(), 10, seed=0)
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
