"""Local epochs of a federated GAN, remembered: federations that begin alike train what they have in common once.

Notebook 02 continues the federations of notebook 01 with other server rules; `medsec.judge.server` lets attackers begin alike.
What a client's epoch leaves behind is kept under a hash of all that decides it, so that the result is the same to the bit,
whoever asks first.
"""

import copy
from collections import OrderedDict

import joblib
from torch import Tensor

from medsec.backdoor import gan
from medsec.backdoor.gan import FederatedGAN, GANClient
from medsec.federated.rounds import State, Update

__all__: list[str] = []

KEPT = 160  # epochs: two federations of four clients and twenty rounds, about 200 MB


def train_client(
    client: GANClient, state: State, federation: FederatedGAN, round: int, *, kept: OrderedDict[str, tuple]
) -> Update:
    """`medsec.backdoor.gan.train_client`, once for all federations with the same ``kept`` in which it would be the same."""
    key = _key(client, state, federation, round)
    owned = (client.generator, client.discriminator, client.optimizer_g, client.optimizer_d)
    if key in kept:
        kept.move_to_end(key)
        states, update = copy.deepcopy(kept[key])
        for each, left in zip(owned, states, strict=True):
            each.load_state_dict(left)
        return update
    update = gan.train_client(client, state, federation, round)
    kept[key] = copy.deepcopy(([each.state_dict() for each in owned], update))
    if len(kept) > KEPT:
        kept.popitem(last=False)
    return update


def _key(client: GANClient, state: State, federation: FederatedGAN, round: int) -> str:
    """Hash of all that decides an epoch."""
    boost = client.boost if round >= client.boost_from else 1.0
    settings = (client.index, boost, round, federation.seed, federation.rounds, federation.average)
    tensors = [
        client.images,
        client.labels,
        client.poisoned,
        *state.values(),
        *client.discriminator.state_dict().values(),
    ]
    for optimizer in (client.optimizer_g, client.optimizer_d):
        tensors += [value for each in optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
    return joblib.hash((settings, federation.gan.model_dump_json(), [t.detach().cpu().numpy() for t in tensors]))
