"""The threat models of all notebooks, printed before every attack, so that attack and defence cannot quietly disagree."""

from medsec.core.threats import ThreatModel, side_by_side

__all__ = ["BACKDOOR", "BACKDOOR_DEFENDED", "EVASION", "INVERSION", "side_by_side"]

BACKDOOR = ThreatModel(
    name="Backdoor in a federated GAN",
    goal="Images of the shared generator carry the attacker's trigger, so that whoever trains on them learns it too.",
    knowledge="Its own images, the model it receives every round, the training recipe. No other client's data.",
    capability="Changes its own training images; the boosted attacker also scales what it sends. One client of four.",
    defender_sees="The server sees every client's generator and the losses that it reports; never images or discriminators.",
    out_of_scope="A dishonest server, colluding majorities, attacks on the channel.",
)
BACKDOOR_DEFENDED = ThreatModel(
    name="Backdoor against a server that defends itself",
    goal="As without a defence: the trigger in the images of the shared generator, in spite of the defence.",
    knowledge="What the others send in the same round, and the defence's code; not the server's secret latent vectors.",
    capability="Poisons its images, scales or optimises what it sends, lies about its losses, bides its time. A minority.",
    defender_sees="Every client's generator, in the clear, and the losses that it reports; no images, no discriminators.",
    out_of_scope="Colluding majorities, a dishonest server, secure aggregation (which hides single updates).",
)
INVERSION = ThreatModel(
    name="Gradient inversion",
    goal="Reconstruct a client's training images from what it sends.",
    knowledge="Architecture, global weights, who sent which update; where said also labels, public images of the same kind, the "
    "defence with its public parts.",
    capability="Honest-but-curious: follows the protocol and computes on what it receives.",
    defender_sees="The client sees its own images and the global model, and decides what to send.",
    out_of_scope="A server that sends altered models, clients that collude with it.",
)
EVASION = ThreatModel(
    name="Evasion by adversarial examples",
    goal="A small change of one image flips the classifier's answer.",
    knowledge="White-box: all weights and the defence. Transfer: only an undefended model of the same kind.",
    capability="Changes every pixel by at most eps (maximum norm, images in [0, 1]) once, at test time.",
    defender_sees="Only the image that arrives; training data are clean.",
    out_of_scope="Physical attacks, poisoned training data, changes larger than eps.",
)
