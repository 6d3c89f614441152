"""Something of one's own on trial: known answers, broken things that must be called out, mistakes told in a line."""

import copy
import functools
import re
import zipfile
from typing import ClassVar

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from medsec.__main__ import main
from medsec.backdoor import epochs, gan
from medsec.core import paths
from medsec.core.errors import InputError
from medsec.federated.aggregators import fedavg, krum, median, uniform_mean
from medsec.inversion import defences
from medsec.judge import Report, balanced, row, server, share
from medsec.judge import median as median_of
from medsec.judge.classifier import audit
from medsec.judge.gradients import judge_gradient_defence
from medsec.judge.server import judge_server_rule
from medsec.nets import convnet

SIDE, PIXELS = 8, 3 * 8 * 8
EPS = 4 / 255


class Linear(nn.Module):
    """Two classes by the sign of w · x + b: how far an image is from the boundary can be computed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(PIXELS, 2)
        w = 0.3 * torch.randn(PIXELS, generator=torch.Generator().manual_seed(1))
        self.layer.weight.data.copy_(torch.stack([-w, w]))
        self.layer.bias.data.copy_(torch.stack([w.sum(), -w.sum()]) / 2)  # grey lies on the boundary

    def forward(self, x):
        return self.layer(x.flatten(1))


@pytest.fixture
def model():
    return Linear().eval()


@pytest.fixture(scope="module")
def images():
    """(60, 3, 8, 8) in [0.2, 0.8], at known distances from the boundary of `Linear`, and their classes."""
    w = Linear().layer.weight[1].detach()
    noise = 0.1 * torch.randn(60, PIXELS, generator=torch.Generator().manual_seed(2))
    noise -= (noise @ w)[:, None] * w / w.square().sum()
    distance = torch.linspace(0.2, 12, 60) / 255 * (1 - 2 * (torch.arange(60) % 2))
    x = (0.5 + noise.clamp(-0.25, 0.25)).view(60, 3, SIDE, SIDE)
    x += (distance[:, None] * w.sign()).view(60, 3, SIDE, SIDE)
    return x, (Linear()(x).argmax(1)).detach()


def cell(report, measure, column="value"):
    return report.table.set_index("measure").loc[measure, column]


# A classifier ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_rate_is_the_one_that_can_be_computed(model, images, norm):
    """What is farther from a flat boundary than eps is left, and nothing else."""
    x, y = images
    w = (model.layer.weight[1] - model.layer.weight[0]).detach()
    signed = (model(x)[:, 1] - model(x)[:, 0]).detach().abs()
    distance = signed / (w.abs().sum() if norm == "Linf" else w.norm())
    eps = EPS if norm == "Linf" else float(distance.median())
    report = audit(model, x, y, eps=eps, norm=norm)
    for factor in (0.5, 1, 2):
        left = (distance > factor * eps).float().mean()
        name = f"{4 * factor:g}/255" if norm == "Linf" else f"{factor * eps:.4g}"
        assert cell(report, f"PGD, eps {name}") == pytest.approx(float(left), abs=0.02)
    assert cell(report, "worst case") <= (distance > eps).float().mean() + 0.02
    assert not report.table["note"].str.contains("FAILED").any()
    middle = cell(report, "to the next answer (DeepFool, median)")
    assert middle == pytest.approx(float(distance.quantile(0.5)) * (255 if norm == "Linf" else 1), rel=0.5)


def test_the_verdict_follows_from_the_rate(model, images):
    x, y = images
    assert audit(model, x, y, eps=1 / 255).verdict.startswith("It keeps most")
    assert audit(model, x, y, eps=11 / 255).verdict.startswith("It loses most")
    assert audit(model, x, y, eps=6 / 255).verdict.startswith("Whether it keeps most")


def test_examples_say_what_became_of_each_image(model, images):
    x, y = images
    report = audit(model, x, y, attacked=20)
    assert len(report.examples) == 60
    attacked = report.examples["PGD 4/255"].dropna()
    assert len(attacked) == 20
    assert attacked.mean() == cell(report, "PGD, eps 4/255")
    assert cell(report, "PGD, eps 4/255", "n") == 20
    assert (
        cell(report, "PGD, eps 4/255", "high") - cell(report, "PGD, eps 4/255", "low") > 0.3
    )  # it knows that 20 are few
    assert report.examples.equals(audit(model, x, y, attacked=20).examples)  # and the same seed gives the same


class Quantised(Linear):
    """Rounds its input: the gradient is 0, and the network as weak as before."""

    def forward(self, x):
        return super().forward((x * 32).round() / 32)


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Misleading(Linear):
    """Its gradient points the wrong way."""

    def forward(self, x):
        return super().forward(Backward.apply(x))


class Detached(Linear):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class Stochastic(Linear):
    def forward(self, x):
        return super().forward(x + 0.01 * torch.randn_like(x))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (Quantised, "its gradient is exactly 0"),
        (Detached, "its gradient is exactly 0"),
        (Misleading, "a search without a gradient turns what withstood PGD"),
        (Misleading, "leaves right answers"),
        (Stochastic, "asked twice, it answers differently"),
    ],
)
def test_a_masked_gradient_is_called_out(broken, said, images):
    x, _ = images
    network = broken().eval()
    y = Linear()(x).argmax(1).detach()
    report = audit(network, x, y, eps=2 / 255, seed=1)
    assert said in report.verdict
    assert "robust" in report.verdict or "loses most" in report.verdict
    assert report.table["note"].str.startswith("FAILED").any()


def test_a_network_without_an_answer_is_called_out(images):
    x, y = images
    constant = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 2)).eval()
    nn.init.zeros_(constant[1].weight)
    assert "gives every image the same answer" in audit(constant, x, y).verdict
    guessing = Linear().eval()
    assert "not clearly better than guessing" in audit(guessing, x, y.roll(1) ^ (torch.arange(60) % 3 == 0)).verdict
    wrong = audit(guessing, x, 1 - y)
    assert "not clearly better than guessing" in wrong.verdict
    assert cell(wrong, "accuracy") == 0


def test_the_model_is_given_back_as_it_was(images):
    x, y = images
    network = nn.Sequential(nn.BatchNorm2d(3), Linear()).eval()
    network[1].layer.bias.requires_grad_(False)
    network(x).sum().backward()
    before = copy.deepcopy(network.state_dict()), [(p.requires_grad, p.grad) for p in network.parameters()]
    grads = [None if g is None else g.clone() for _, g in before[1]]
    other = Linear().eval()
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    audit(network, x, y, attacked=10, surrogate=other)
    assert torch.rand(1) == drawn  # nor are the random numbers of the caller
    torch.testing.assert_close(network.state_dict(), before[0], rtol=0, atol=0)
    for p, (needs, grad), value in zip(network.parameters(), before[1], grads, strict=True):
        assert p.requires_grad == needs
        assert p.grad is grad
        assert grad is None or torch.equal(grad, value)
    assert not network.training
    assert x.equal(images[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda m, x, y: (m, x.numpy(), y.tolist()),
        lambda m, x, y: (m, x.double(), y.to(torch.int32)),
        lambda m, x, y: (copy.deepcopy(m).double(), x, y),
        lambda m, x, y: (copy.deepcopy(m).to(torch.bfloat16), x, y),
        lambda m, x, y: (m.forward, x, y),
        lambda m, x, y: (torch.jit.script(m), x, y),
    ],
    ids=["arrays", "float64 images", "float64 model", "bfloat16 model", "function", "TorchScript"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_it_takes_a_model_as_it_is(change, model, images):
    report = audit(*change(model, *images), attacked=12, surrogate=model)
    assert cell(report, "accuracy") > 0.9
    assert 0 < cell(report, "PGD, eps 4/255") < 1


def test_any_shape_and_number_of_classes():
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(60, 1, 6, 10, generator=rng)
    network = nn.Sequential(nn.Flatten(), nn.Linear(60, 5)).eval()
    report = audit(
        network, x, network(x).argmax(1).detach().clone().index_put((torch.arange(5),), torch.arange(5)), attacked=8
    )
    assert report.to_html().count("<img") == len(report.figures)
    tiny = audit(Linear().eval(), torch.tensor([0.2, 0.8])[:, None, None, None].expand(-1, 3, 8, 8), [0, 1])
    assert "not clearly better than guessing" in tiny.verdict  # of two images nothing is clear
    assert any("Transfer: fewer than" in sentence for sentence in tiny.not_tested)


def softmaxed(m):
    return lambda x: m(x).softmax(1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m, x, y: (m, (255 * x).round(), y), "divide them by 255"),
        (lambda m, x, y: (m, (255 * x).to(torch.uint8), y), "images / 255"),
        (lambda m, x, y: (m, x - 0.5, y), "normalise inside the model"),
        (lambda m, x, y: (m, x.where(x < 0.7, torch.nan), y), "NaN"),
        (lambda m, x, y: (m, x[:, 0], y), "images[:, None]"),
        (lambda m, x, y: (m, x.movedim(1, 3), y), "permute(0, 3, 1, 2)"),
        (lambda m, x, y: (m, ["a"], y), "no array of numbers"),
        (lambda m, x, y: (m, x, ["a"] * 60), "no array of numbers"),
        (lambda m, x, y: (m, x[:0], y[:0]), "n >= 1"),
        (lambda m, x, y: (m, x, y[1:]), "59 labels for 60 images"),
        (lambda m, x, y: (m, x, y + 1), "classes 0 to 1"),
        (lambda m, x, y: (m, x, y.float()), "whole numbers"),
        (lambda m, x, y: (m, x, y[:, None]), "need (n,)"),
        (lambda m, x, y: (m, x, torch.zeros_like(y)), "no image of class 1"),
        (lambda m, x, y: (lambda x: m(x)[:, :1], x, y), "need logits"),
        (lambda m, x, y: (lambda x: m(x)[0], x, y), "need logits"),
        (lambda m, x, y: (lambda x: (m(x), None), x, y), "need the logits alone"),
        (lambda m, x, y: (softmaxed(m), x, y), "without the softmax"),
        (lambda m, x, y: (lambda x: m(x) / 0, x, y), "NaN or infinite logits"),
        (
            lambda m, x, y: (lambda z: m(z).where((z - x[50]).flatten(1).any(1)[:, None], torch.nan), x, y),
            "for image 50",
        ),
        (lambda m, x, y: (copy.deepcopy(m).train(), x, y), "model.eval()"),
        (lambda m, x, y: (m, x[:, :1], y), "cannot take a batch"),
        (lambda m, x, y: ("model.pt", x, y), "is of type str"),
    ],
)
def test_a_mistake_is_told_in_a_line(change, said, model, images):
    with pytest.raises(InputError, match=re.escape(said)) as error:
        audit(*change(model, *images))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("how", "said"),
    [({"eps": 4}, "4/255"), ({"eps": 0}, "above 0"), ({"norm": "inf"}, "Linf"), ({"attacked": 0}, "at least 1")],
)
def test_a_wrong_setting_too(how, said, model, images):
    with pytest.raises(InputError, match=said):
        audit(model, *images, **how)


# The report ------------------------------------------------------------------------------------------------------------


def test_what_a_user_writes_is_shown_and_not_obeyed():
    evil = '<script>alert("x")</script> | `*a*`\n# b'
    report = Report(evil, evil, pd.DataFrame([row(evil, evil, 0.5, note=evil)]), [evil], [evil], [(evil, b"\x89PNG")])
    assert "<script" not in report.to_html()
    assert report.to_html().count("&lt;script&gt;") == 10
    page = report.to_markdown()
    assert "<script" not in page.replace("\\<", "")
    assert not [line for line in page.splitlines() if line.startswith("# b")]
    assert pd.read_csv(pd.io.common.StringIO(report.to_csv()))["note"][0] == evil
    assert not re.search(r'(?:src|href)="(?!data:)', report.to_html())


def test_intervals_know_how_few_there_are():
    assert share(2, 2)[1] < 0.4
    assert share(0, 0)[3] == 0
    truth = np.array([0] * 8 + [1] * 2)
    value, low, high = balanced(truth, truth)
    assert (value, round(high, 6)) == (1, 1)
    assert low < 0.7  # two images of class 1 prove little
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        _, low, high = median_of(rng.normal(size=16))
        inside += low <= 0 <= high
    assert inside >= 185


# A server's rule -------------------------------------------------------------------------------------------------------

quick = functools.partial(judge_server_rule, attackers=["boost"], rounds=2, images=16)


def test_a_rule_that_does_nothing_is_called_out():
    for lazy in (uniform_mean, fedavg, lambda updates, round: (uniform_mean(updates)[0], {})):
        assert "does what the plain mean does" in quick(lazy).verdict
    assert "does what the plain mean does" not in quick(median).verdict


def test_a_rule_that_flags_nobody_is_called_out():
    def never(updates, round):
        return median(updates)[0], {"flagged": {u.client: False for u in updates}}

    def first(updates, round):
        return median(updates)[0], {"flagged": {u.client: u.client == 0 for u in updates}}

    assert quick(never).verdict.endswith("It flags nobody, whoever attacks.")
    assert "flags nobody" not in quick(first).verdict


def test_a_rule_that_knows_the_attacker_equals_the_oracle():
    """Large enough for the attack to work against the mean."""

    def told(updates, round):
        return fedavg(updates, weights=[float(u.client != 0) for u in updates])

    report = judge_server_rule(told, attackers=["boost"], rounds=8)
    rates = report.examples.set_index("defence")["trigger_rate"]
    assert rates["mean"] > 0.6
    assert rates["rule"] == rates["oracle"] < 0.05
    assert report.verdict.startswith("It stops 1 of the 1 attackers")
    assert cell(report, "honest clients shut out") == pytest.approx(0.25)
    assert "honest clients shut out 0.25" in report.verdict


@pytest.mark.parametrize(
    ("mean", "rule", "outcome"),
    [
        (180, 3, "stopped"),
        (180, 20, "open"),
        (180, 60, "gets through"),
        (180, 200, "made worse"),
        (30, 0, "no test"),
        (30, 90, "made worse"),
        (104, 0, "no test"),  # of 200: not clearly more than half
    ],
)
def test_the_outcome_follows_from_the_rates(mean, rule, outcome):
    rates = {name: server._Rate.of([server._Finished(hits)]) for name, hits in (("mean", mean), ("rule", rule))}
    assert server._outcome(rates) == outcome


class Counting:
    """Remembers how often it was called: a run must not find what another left."""

    seen: ClassVar[list[int]] = []

    def __init__(self, state):
        self.calls, self.state = 0, state

    def __call__(self, updates, round):
        Counting.seen.append(self.calls - round)
        self.calls += 1
        for u in updates:
            for value in u.state.values():
                value.zero_()  # it may spoil what it was given
        return self.state, {}


def test_a_rule_with_a_memory_is_new_in_every_run():
    report = quick(Counting)
    assert set(Counting.seen) == {0}
    assert cell(report, "distance of its aggregate to the mean") > 0.5
    remembering = Counting({})
    with pytest.raises(InputError, match="other names"):
        quick(remembering)
    assert remembering.calls == 0


def test_the_attacker_who_knows_the_rule_uses_a_copy():
    report = judge_server_rule(
        functools.partial(krum, n_malicious=1, strict=False), attackers=["knows_the_rule"], rounds=3, images=16
    )
    assert set(report.examples["defence"]) == {"mean", "oracle", "rule"}


def test_attackers_that_begin_alike_train_once_and_nothing_changes(monkeypatch):
    """The mean and a rule that reads no losses: `boost_liar` sends what `boost` sends, and both begin as `honest` does."""
    trained, original = [], gan.train_client
    monkeypatch.setattr(gan, "train_client", lambda *a: trained.append(1) or original(*a))
    asked = {"attackers": ["honest", "boost", "boost_liar", "waitout"], "rounds": 5, "images": 16}

    def judged():
        trained.clear()
        report = judge_server_rule(median, **asked)
        return report.examples, report.table[report.table["part"] != "cost"], len(trained)

    *shared, fewer = judged()
    monkeypatch.setattr(epochs, "train_client", lambda *a, kept: gan.train_client(*a))
    *apart, most = judged()
    for a, b in zip(shared, apart, strict=True):
        pd.testing.assert_frame_equal(a, b)
    assert fewer < 0.7 * most


def broken_state(change):
    return lambda updates, round: (change(dict(updates[0].state)), {})


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda updates, round: 1 / 0, "raised ZeroDivisionError"),
        (lambda updates: None, "raised TypeError"),
        (lambda updates, round: updates[0].state, "returned a OrderedDict|returned a dict"),
        (lambda updates, round: (None, {}), "two dictionaries"),
        (broken_state(lambda state: dict(list(state.items())[1:])), "other names"),
        (broken_state(lambda state: {k: v.double() for k, v in state.items()}), "expected"),
        (broken_state(lambda state: {k: v[None] for k, v in state.items()}), "expected"),
        (broken_state(lambda state: {k: v / 0 if v.is_floating_point() else v for k, v in state.items()}), "NaN"),
        (lambda updates, round: (updates[0].state, {"weights": [1.0]}), "weights"),
    ],
)
def test_a_broken_rule_is_told_in_a_line(rule, said):
    with pytest.raises(InputError, match=said) as error:
        quick(rule)
    assert "\n" not in str(error.value)


def test_odd_input_is_tried():
    def needs_four(updates, round):
        assert len(updates) == 4, "where is the fourth?"
        return fedavg(updates)

    report = quick(needs_four)
    assert "where is the fourth" in cell(report, "only one is left", "note")
    assert cell(report, "a client claims a million images: what it gains") > 0.9
    with pytest.raises(InputError, match="no attacker 'bost'; choose from honest, boost"):
        quick(median, attackers=["bost"])


# A gradient defence ----------------------------------------------------------------------------------------------------

tiny = functools.partial(judge_gradient_defence, victims=3, candidates=6, images=16, rounds=1, iterations=2)


class Remembering:
    """Sends the gradient of its first image for ever."""

    def __init__(self, seed):
        self.first = None

    def __call__(self, model, x, y, round):
        self.first = self.first or convnet.gradients(model, x, y)
        return self.first


def test_gradients_that_are_sent_as_they_are_tell_everything():
    report = tiny(defences.none)
    assert "sends the gradient as it is" in report.verdict
    assert cell(report, "named, by its gradient").tolist() == [1, 1]  # with and without: each is its own nearest
    for hidden in (lambda model, x, y, round: [torch.zeros_like(p) for p in model.parameters()], Remembering):
        report = tiny(hidden)
        assert report.verdict.startswith("No attack here tells")
        assert (cell(report, "named, by a copy of the defence")) < 0.5
    assert "nothing is clearly learnt" in report.verdict or "too short a training" in report.verdict
    assert len(report.figures) == 2


def test_the_copy_of_the_attacker_has_another_seed():
    seeds = set()

    def drawn(model, x, y, round, *, seed):
        seeds.add(seed)
        return defences.none(model, x, y, round)

    tiny(drawn)
    assert len(seeds) == 5  # four clients and the attacker


@pytest.mark.parametrize(
    ("defence", "said"),
    [
        (lambda model, x, y, round: 1 / 0, "raised ZeroDivisionError"),
        (lambda model, x, y, round: defences.none(model, x, y, round)[1:], "gradients for"),
        (lambda model, x, y, round: [g[None] for g in defences.none(model, x, y, round)], "has shape"),
        (lambda model, x, y, round: [g / 0 for g in defences.none(model, x, y, round)], "NaN"),
        (lambda model, x, y, round: None, "list of tensors"),
    ],
)
def test_a_broken_defence_is_told_in_a_line(defence, said):
    with pytest.raises(InputError, match=said) as error:
        tiny(defence)
    assert "\n" not in str(error.value)


# The command -----------------------------------------------------------------------------------------------------------


MODEL = """
from torch import nn

half = 0.5


def needs(x):
    return x


def make():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).eval()
    for k, sign in enumerate((-1, 1)):  # brighter than a half: class 1
        nn.init.constant_(model[2].weight[k], sign)
        nn.init.constant_(model[2].bias[k : k + 1], -3 * half * sign)
    return model
"""


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(40):
        place = tmp_path / "my-images" / ("dark" if k % 2 else "light")
        place.mkdir(parents=True, exist_ok=True)
        level = 90 if k % 2 else 160
        Image.fromarray(rng.normal(level, 8, (28, 28, 3)).clip(0, 255).astype(np.uint8)).save(place / f"p{k:02d}_a.png")
    (tmp_path / "my_model.py").write_text(MODEL, encoding="utf-8")
    return tmp_path


def test_the_command_audits_a_folder(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    asked = [
        "audit",
        "my_model.py:make",
        "--data",
        "my-images",
        "--eps",
        "60/255",
        "--out",
        "r.html",
        "--examples",
        "e.csv",
    ]
    assert main(asked) == 0
    said = capsys.readouterr()
    assert said.out.startswith("It loses most of its right answers")
    assert "classes by number: 0 dark, 1 light" in said.err
    page = (folder / "r.html").read_text(encoding="utf-8")
    assert "my_model.py:make" in page
    assert "0 dark, 1 light" in page
    assert str(folder) not in page
    assert len(pd.read_csv(folder / "e.csv")) == 40
    assert main(asked) == 2
    assert "r.html exists and is not overwritten" in capsys.readouterr().err
    assert main([*asked[:4], "--size", "14", "--channels", "1"]) == 2  # the model wants three
    assert "cannot take a batch of shape (10, 1, 14, 14)" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_command_opens_models_but_no_pickle(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    x, y = torch.rand(20, 3, SIDE, SIDE), torch.arange(20) % 2
    np.savez("mine.npz", images=x.numpy(), labels=y.numpy())
    network = Linear().eval()
    torch.jit.script(network).save("model.pt")
    n = torch.export.Dim("n")
    torch.export.save(torch.export.export(network, (x,), dynamic_shapes=({0: n},)), "model.pt2")
    for file in ("model.pt", "model.pt2"):
        assert main(["audit", file, "--data", "mine.npz", "--attacked", "4", "--eps", "0.02"]) == 0
        assert "# Audit of the classifier" in capsys.readouterr().out
    torch.save(network, "pickle.pt")
    (folder / "weights.safetensors").write_bytes(b"\0" * 16)
    (folder / "cut.pt2").write_bytes((folder / "model.pt2").read_bytes()[:500])
    zipfile.ZipFile("empty.npz", "w").close()
    for arguments, remedy in (
        (["pickle.pt", "--data", "mine.npz"], "is a pickle, which runs whatever is in it"),
        (["weights.safetensors", "--data", "mine.npz"], "weights only"),
        (["cut.pt2", "--data", "mine.npz"], "cannot be opened"),
        (["gone.pt", "--data", "mine.npz"], "does not exist"),
        (["my_model.py:half", "--data", "mine.npz"], "cannot be called"),
        (["my_model.py:gone", "--data", "mine.npz"], "nothing of that name"),
        (["my_model.py:nn.Linear", "--data", "mine.npz"], "write it as file.py:name"),
        (["my_model.py:needs", "--data", "mine.npz"], "takes nothing and returns the model; it raised TypeError"),
        (["my_model.py", "--data", "mine.npz"], "my_model.py:make"),
        (["model.pt", "--data", "gone"], "does not exist"),
        (["model.pt", "--data", "empty.npz"], "needs two arrays"),
        (["model.pt", "--data", "my_model.py"], "is no .npz"),
        (["model.pt", "--data", "my-images/dark"], "0 class folders"),
        (["model.pt", "--data", "mine.npz", "--eps", "4/0"], "write it like 4/255"),
        (["model.pt", "--data", "mine.npz", "--out", "report.pdf"], ".html"),
    ):
        assert main(["audit", *arguments]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ")
        assert remedy in said


def test_the_command_describes_a_folder(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["describe", "my-images"]) == 2
    assert "too few images" in capsys.readouterr().err
    rng = np.random.default_rng(1)
    for k in range(100):
        place = folder / "my-images" / ("dark" if k % 2 else "light")
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(place / f"q{k:02d}.png")
    assert main(["describe", "my-images", "--patients", "^([pq][0-9]+)"]) == 0
    assert "| client |" in capsys.readouterr().out


def test_the_command_judges_a_rule(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "my_rule.py").write_text("def rule(updates, round):\n    return updates\n", encoding="utf-8")
    assert main(["judge", "server", "my_rule.py:rule"]) == 2
    assert "need (state, diagnostics)" in capsys.readouterr().err


def test_a_run_that_is_ended_says_so(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "my_rule.py").write_text("def rule(updates, round):\n    raise KeyboardInterrupt\n", encoding="utf-8")
    assert main(["judge", "server", "my_rule.py:rule", "--out", "r.html"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted: no report was written"
    assert not (folder / "r.html").exists()


def test_a_page_fits_on_one_sheet():
    """As far as a style can say it: A4, small margins, pictures side by side and of bounded height, nothing that overflows."""
    report = Report("a", "b", pd.DataFrame([row("c", "d" * 300, 0.5)]), figures=[("e", b"")] * 2)
    style = re.search(r"<style>(.*?)</style>", report.to_html(), re.DOTALL)[1]
    for needed in (
        "@page { size: A4",
        "max-height: 62mm",
        "overflow-wrap: anywhere",
        ".figures { display: flex",
        "@media print",
    ):
        assert needed in style
    assert "page-break" not in report.to_html()


def test_help_lists_the_commands(capsys):
    for asked in (["--help"], ["audit", "--help"], ["judge", "server", "--help"], ["judge", "gradient", "--help"]):
        with pytest.raises(SystemExit) as done:
            main(asked)
        assert done.value.code == 0
        said = capsys.readouterr().out
        if asked == ["--help"]:
            for needed in (
                "describe",
                "run 04",
                "audit model",
                "judge server",
                "judge attack",
                "judge gradient",
                "exit status",
            ):
                assert needed in said
    assert "my_defence.py:defend" in said


JUDGED = ("_gradient_defence", "_server_rule", "n_attack")
EXAMPLES = sorted(paths.ROOT.glob("examples/*.ipynb"))


def test_every_call_has_an_example_and_a_line_in_the_docs():
    told = (paths.ROOT / "docs" / "test-your-own.md").read_text(encoding="utf-8")
    assert [file.stem for file in EXAMPLES] == ["audit_a_model", *(f"judge_a{name}" for name in JUDGED)]
    for file in EXAMPLES:
        assert f"](../examples/{file.name})" in told


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_the_examples_run(example):
    """As a notebook's cells, one after the other; what the last one shows is a report, as Markdown with its figures."""
    notebook = nbformat.read(example, as_version=4)
    assert [cell.id for cell in notebook.cells] == [str(k) for k in range(len(notebook.cells))]
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    lines = [line for line in "\n".join(code).splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 20
    space = {}
    for source in code:
        exec(source, space)
    assert code[-1].splitlines()[-1] == "report"
    shown = space["report"]._repr_markdown_()
    assert shown.startswith("# ")
    assert "## What this report does not say" in shown
    assert shown.count("](data:image/png;base64,") == len(space["report"].figures)
