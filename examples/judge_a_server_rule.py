"""Judge a server's rule of your own: replace `rule`. Run all attackers in two minutes: attackers=None. docs/test-your-own.md."""

import medsec  # noqa: F401, I001  (before torch: it pins the instruction set, so that numbers repeat)
import numpy as np

from medsec.federated.aggregators import fedavg, flatten
from medsec.judge.server import judge_server_rule


def rule(updates, round):
    """Leave out the client whose state lies farthest from the median of all."""
    points = np.stack([flatten(update.state) for update in updates])
    distance = np.linalg.norm(points - np.median(points, axis=0), axis=1)
    return fedavg(updates, weights=(distance < distance.max()).astype(float))


report = judge_server_rule(rule, attackers=["boost"], rounds=3, images=32, name="farthest out")
print(report)
