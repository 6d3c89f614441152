"""The federations of notebooks 01 to 03 on Flower (docs/flower.md): what a hospital and the server do, as Flower's apps.

``python -m experiments.flower loop`` runs the same federation in one process and prints the same fingerprint;
``python -m experiments.flower deal --folder FOLDER`` writes the images of each of its hospitals, as in the notebooks, to a file.
"""

import argparse
import functools
import io
import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import medsec  # noqa: F401  (pins the instruction set before numpy and torch are imported)

# isort: split

import numpy as np
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from experiments import params as parameters
from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.feddetect import cells as feddetect_eval
from experiments.gia_defense import clients as gia_clients
from experiments.params import Params
from medsec import data
from medsec.backdoor import gan, triggers
from medsec.core import files, paths
from medsec.core.errors import InputError, command
from medsec.core.params import Count, Section, Seed, validated
from medsec.core.seeds import derive_seed, fingerprint
from medsec.federated import aggregators, classifier, flower, secagg
from medsec.federated.rounds import Aggregator, State, Update
from medsec.nets import convnet

MEMORY = ("discriminator", "optimizer_g", "optimizer_d")  # of a GAN's client: it is never sent
OWN = ("images", "labels")  # of a hospital's file


class Federation(Section):
    """What the server tells every client. ``size``, ``channels`` and ``classes`` are said, as a server holds no image.

    ``attack`` makes the malicious clients of ``fedgan.malicious`` stamp their images: only where a client is dealt its
    images from a cohort. A hospital with images of its own never does.
    """

    kind: Literal["gan", "classifier"]
    cohort: str
    seed: Seed
    rule: str
    defence: str
    attack: bool
    size: Count
    channels: Count
    classes: Count
    params: dict[str, Any]


def federation(config: Mapping, profile: str = "quick") -> Federation:
    """The settings of a run from Flower's run configuration, ``flower_app/pyproject.toml``.

    Raises:
        InputError: an unknown kind, rule or defence, or an impossible number.
    """
    clients, rounds = config["clients"], config["rounds"]
    change = {
        "fedgan": {"n_clients": clients, "rounds": rounds},
        "inversion": {"federation": {"n_clients": clients, "rounds": rounds}},
    }
    params = parameters.validate(parameters.merge(parameters.load(profile).model_dump(), change), "the run's settings")
    named = {name: config[name] for name in Federation.model_fields if name != "params"}
    found = validated(Federation, {**named, "params": params.model_dump(mode="json")}, "the run's settings")
    if found.defence not in gia_clients.VARIANTS:
        raise InputError(f"defence {found.defence!r}: choose one of {', '.join(gia_clients.VARIANTS)}")
    if found.rule not in feddetect_eval.VARIANTS:
        raise InputError(f"server rule {found.rule!r}: choose one of {', '.join(feddetect_eval.VARIANTS)}")
    if not flower.NAME.fullmatch(config["name"]):
        raise InputError(f"a run cannot be called {config['name']!r}: use up to 40 small letters, digits and dashes")
    if config["masked"] and found.rule != "none":
        raise InputError(f"server rule {found.rule!r} needs each client's update, which masks hide; use rule none")
    if found.kind == "classifier" and found.rule not in aggregators.RULES:
        raise InputError(f"server rule {found.rule!r} looks at generators; use one of {', '.join(aggregators.RULES)}")
    return found


# A hospital ----------------------------------------------------------------------------------------------------------


def build(settings: dict, node: Mapping) -> flower.Participant:
    """The client of a node.

    Args:
        settings: a `Federation`, from the server.
        node: of a hospital ``client`` and ``images``, an npz file (`read_images`). It may also insist on a ``defence``, and
            allow public images by a ``cohort``. Of a simulation ``partition-id``: the client is dealt images from the cohort.

    Raises:
        InputError: what the server asks does not fit the node.
    """
    it = validated(Federation, settings, "the server's settings")
    params = _params(it.model_dump_json())
    index, clients = node["client"] if "client" in node else node["partition-id"], params.fedgan.n_clients
    if type(index) is not int or not 0 <= index < clients:
        raise InputError(f"client {index} in the node's configuration: the run has clients 0 to {clients - 1}")
    _allowed(it, node)
    images, labels = read_images(Path(node["images"])) if "images" in node else _dealt(it.model_dump_json())[index]
    shape = (it.channels, it.size, it.size)
    if images.shape[1:] != shape or labels.max() >= it.classes:
        found = f"{tuple(images.shape[1:])} with classes to {int(labels.max())}"
        raise InputError(f"client {index} holds images {found}; the run has {shape} with {it.classes} classes")
    if it.kind == "gan":
        return GANHospital(index, images, labels, it, params, attacks=it.attack and "images" not in node)
    return ClassifierHospital(index, images, labels, it, params)


def _allowed(it: Federation, node: Mapping) -> None:
    """Raises InputError where the server asks for more than whoever runs the node has allowed."""
    if it.cohort in paths.OWN:
        where = f"cohort {it.cohort} lies where the server's settings say"
        raise InputError(f"{where}; a node takes images from its own configuration only")
    if node.get("defence", it.defence) != it.defence:
        raise InputError(f"this hospital sends gradients with defence {node['defence']} only, not {it.defence}")
    needs_public = it.kind == "classifier" and it.defence not in gia_clients.DEFENCES
    if "images" in node and needs_public and node.get("cohort") != it.cohort:
        allow = f'cohort="{it.cohort}" in the node\'s configuration allows it'
        raise InputError(f"defence {it.defence} reads public images of {it.cohort} and keeps networks of them: {allow}")


@functools.lru_cache(maxsize=1)
def _params(federation_json: str) -> Params:
    return parameters.validate(json.loads(federation_json)["params"], "the server's settings")


def read_images(file: Path) -> tuple[Tensor, Tensor]:
    """A hospital's own images from an npz file: ``images`` uint8 (n, S, S) or (n, S, S, C), ``labels`` (n,) integers.

    Returns:
        (n, C, S, S) float32 in [0, 1] and (n,) int64.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            images, labels = (stored[name] for name in OWN)
    except FileNotFoundError:
        raise InputError(
            f"{files.shown(file)} is missing; name the hospital's file in the node's configuration"
        ) from None
    except Exception as error:
        raise InputError(f"{files.shown(file)} holds no {' and '.join(OWN)} ({type(error).__name__})") from None
    fits = images.dtype == np.uint8 and images.ndim in (3, 4) and np.issubdtype(labels.dtype, np.integer)
    if not fits or labels.shape != images.shape[:1] or not len(labels) or labels.min() < 0:
        raise InputError(f"{files.shown(file)}: images must be uint8 (n, S, S[, C]) and labels n whole numbers from 0")
    channels_first = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    split = data.Split(np.ascontiguousarray(channels_first), labels.astype(np.int64))
    return torch.from_numpy(split.float()), torch.from_numpy(split.labels)


@functools.lru_cache(maxsize=1)  # clients of one process ask for it at every message
def _dealt(federation_json: str) -> list[tuple[Tensor, Tensor]]:
    """What each client of the notebook's federation holds."""
    it, params = Federation.model_validate_json(federation_json), _params(federation_json)
    cohort = data.load(it.cohort, params.cohorts)
    split = cohort["client"]
    images, labels = torch.from_numpy(split.float()), torch.from_numpy(split.labels)
    if it.kind == "gan":
        held = fedgan_eval.parts(cohort, params, it.seed)
    else:
        held = gia_clients.places(gia_clients.Setup(params, cohort, {}, None, None), it.seed)
    return [(images[part], labels[part]) for part in held]


class GANHospital:
    """A client of the federated GAN (`medsec.federated.flower.Participant`)."""

    def __init__(self, index: int, images: Tensor, labels: Tensor, it: Federation, params: Params, *, attacks: bool):
        self.index = index
        self.federation = gan.new_federation(
            [images], [labels], it.classes, params.fedgan, it.seed, _trigger(it, params) if attacks else None, [index]
        )
        (self.client,) = self.federation.clients

    def train(self, state: State, round: int) -> Update:
        return gan.train_client(self.client, state, self.federation, round)

    def state_dict(self) -> dict:
        return {name: getattr(self.client, name).state_dict() for name in MEMORY}

    def load_state_dict(self, state: dict) -> None:
        for name in MEMORY:
            getattr(self.client, name).load_state_dict(state[name])


def _trigger(it: Federation, params: Params) -> triggers.Trigger:
    p = params.fedgan.trigger
    return triggers.make_trigger(p.kind, image_size=it.size, channels=it.channels, size=p.size, opacity=p.opacity)


class ClassifierHospital:
    """A client of the classification federation, with the defence of its gradients."""

    def __init__(self, index: int, images: Tensor, labels: Tensor, it: Federation, params: Params):
        self.index, self.images, self.labels, self.it, self.params = index, images, labels, it, params
        self.model = _network(it, params)
        if it.defence in gia_clients.CONTROLS:
            raise InputError(f"defence {it.defence} is a control of notebook 03 whose memory no host can keep")
        if it.defence in gia_clients.DEFENCES:  # of gradients: they need no public images
            setup = gia_clients.Setup(params, None, {}, None, None)
        else:
            setup = gia_clients.prepare(it.cohort, params)
        self.client = gia_clients.client(it.defence, setup, images, labels, derive_seed(it.seed, "defence", index))

    def train(self, state: State, round: int) -> Update:
        p = self.params.inversion.federation
        return classifier.local_epoch(
            self.model, state, self.images, self.labels, self.client.defend, p, self.it.seed, self.index, round
        )

    @property
    def shadow(self):
        """The shadow generator of the defences that have one: the only ones with a memory."""
        return getattr(self.client.perturb, "__self__", None)

    def state_dict(self) -> dict:
        shadow = self.shadow
        return {"masks": shadow.masks, "generator": shadow.generator.state_dict()} if shadow else {}

    def load_state_dict(self, state: dict) -> None:
        if shadow := self.shadow:
            shadow.masks = state["masks"]
            shadow.generator.load_state_dict(state["generator"])


def _network(it: Federation, params: Params) -> convnet.ConvNet:
    width = params.inversion.federation.width
    return convnet.new(it.size, it.channels, it.classes, width=width, seed=derive_seed(it.seed, "network"))


client_app = flower.client_app(build, paths.federation)
secagg.answer_masked(client_app, build, paths.federation)


# The server ----------------------------------------------------------------------------------------------------------


def server_side(it: Federation) -> tuple[State, Aggregator]:
    """What the server holds before the first round, and its rule, which is in force from the first round on."""
    params = _params(it.model_dump_json())
    if it.kind == "classifier":
        rule = aggregators.fedavg if it.rule == "none" else aggregators.rule(it.rule, 1)
        return _network(it, params).state_dict(), rule
    # Two images, as a federation is made of clients; nobody trains on them.
    blank = torch.zeros(2, it.channels, it.size, it.size)
    none = gan.new_federation([blank], [torch.zeros(2, dtype=torch.int64)], it.classes, params.fedgan, it.seed)
    watcher = feddetect_eval.hardened(params, none)
    return none.state, feddetect_eval.defence(it.rule, params, none, watcher)


server_app = ServerApp()


@server_app.main()
def main_of_server(grid: Grid, context: Context) -> None:
    config = context.run_config
    it = federation(config, config["profile"])
    state, rule = server_side(it)
    state, _ = flower.serve(
        grid,
        state,
        rule,
        rounds=config["rounds"],
        n_clients=config["clients"],
        settings=it.model_dump(),
        folder=paths.federation() / config["name"],
        timeout=config["timeout"],
        wait=config["wait"],
        masked=secagg.masked_round if config["masked"] else None,
    )
    print(json.dumps({"fingerprint": digest(state)}), flush=True)


def digest(state: State) -> str:
    """Sixteen hexadecimal digits of a whole state."""
    return fingerprint(torch.cat([value.double().flatten() for value in state.values()]))


# In one process ------------------------------------------------------------------------------------------------------


def whole(it: Federation) -> gan.FederatedGAN:
    """All clients of a federated GAN, as the notebooks have them."""
    params = _params(it.model_dump_json())
    images, labels = zip(*_dealt(it.model_dump_json()), strict=True)
    trigger = _trigger(it, params) if it.attack else None
    return gan.new_federation(images, labels, it.classes, params.fedgan, it.seed, trigger)


def loop(it: Federation) -> State:
    """The last state of the same federation as the notebooks run it: the reference."""
    if it.kind == "gan":
        return gan.run(whole(it), aggregate=server_side(it)[1], strict=True).state
    if it.rule != "none":
        raise InputError(f"rule {it.rule}: the notebooks' federation of classifiers averages; use rule none")
    params = _params(it.model_dump_json())
    held = _dealt(it.model_dump_json())
    images, labels = zip(*held, strict=True)
    defences = [ClassifierHospital(i, *own, it, params).client.defend for i, own in enumerate(held)]
    model = _network(it, params)
    return classifier.train(model, images, labels, defences, params.inversion.federation, it.seed)[-1]


def deal(it: Federation, folder: Path) -> None:
    """Write the images of every client of the notebook's federation to ``folder/client-0.npz`` and so on.

    Raises:
        InputError: such a file exists.
    """
    params = _params(it.model_dump_json())
    targets = [folder / f"client-{i}.npz" for i in range(params.fedgan.n_clients)]
    if taken := [target.name for target in targets if target.exists()]:
        raise InputError(f"{', '.join(taken)} exist in {folder.name}: choose another folder")
    for target, (images, labels) in zip(targets, _dealt(it.model_dump_json()), strict=True):
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        stream = io.BytesIO()
        np.savez_compressed(stream, images=pixels, labels=labels.numpy())
        files.write(target, stream.getvalue())


def run_config(changes: list[str]) -> dict:
    """The run configuration of ``flower_app``, with changes such as ``rounds=3``, written as in TOML."""
    config = tomllib.loads(files.read_text(paths.ROOT / "flower_app" / "pyproject.toml"))["tool"]["flwr"]["app"][
        "config"
    ]
    try:
        changed = tomllib.loads("\n".join(changes))
    except tomllib.TOMLDecodeError as error:
        raise InputError(
            f"{' '.join(changes)}: write each as in TOML, like rounds=3 or rule='\"median\"' ({error})"
        ) from None
    if unknown := changed.keys() - config.keys():
        raise InputError(f"unknown setting {', '.join(sorted(unknown))}: choose from {', '.join(config)}")
    return config | changed


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.flower", description=__doc__.splitlines()[0])
    parser.add_argument(
        "action", choices=("loop", "deal"), help="run it in this process, or write the hospitals' files"
    )
    parser.add_argument("--folder", type=Path, default=Path("hospitals"), help="of deal (default: %(default)s)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of flower_app's configuration"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = run_config(args.set)
    it = federation(config, config["profile"])
    if args.action == "deal":
        deal(it, args.folder)
    else:
        print(json.dumps({"fingerprint": digest(loop(it))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
