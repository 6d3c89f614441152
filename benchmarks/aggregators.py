"""Server rules: ours and those of other libraries, on the same updates, and who chooses rightly.

``make bench`` runs it in an environment of its own and it writes ``benchmarks/results.csv``: times, and of Krum, in how
many of `DRAWS` the chosen update is the one that distances by subtraction in float64 choose, for updates ever smaller against
the weights.

Flower takes a list of layers, byzfl and byzpy one vector a client; ours a dictionary of tensors. What it takes to bring the
updates into that form is not timed. Flower adds up in float32, ours in float64; byzfl's mean has no weights. byzfl and byzpy
count one neighbour more in Krum than its paper: they are judged by their own rule. Ten million parameters are measured with 8
clients only.
"""

from collections.abc import Callable

import byzfl
import numpy as np
import torch
from byzpy.aggregators.coordinate_wise.median import CoordinateWiseMedian
from byzpy.aggregators.coordinate_wise.trimmed_mean import CoordinateWiseTrimmedMean
from byzpy.aggregators.geometric_wise.krum import MultiKrum
from common import OURS, compared, one_thread, write
from flwr.server.strategy import aggregate as flower
from flwr.serverapp.strategy.multikrum import compute_distances

from medsec.federated import aggregators as ours
from medsec.federated.rounds import Update

SIZES = ((8, 1_000_000), (64, 1_000_000), (8, 10_000_000))
LAYERS = 10
RATIOS, DRAWS, SMALL = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6), 10, 20_000
MESSAGES = "flwr, Message API"


def drawn(n: int, d: int, ratio: float, seed: int) -> np.ndarray:
    """(n, d) float32: common weights of size 1, and of each client an update of size ``ratio``, larger from one to the next."""
    rng = np.random.default_rng(seed)
    size, weights = ratio * (1 + 0.02 * rng.permutation(n)), rng.standard_normal(d)
    return np.stack([(weights + scale * rng.standard_normal(d)).astype(np.float32) for scale in size])


class Record:
    """As much of Flower's ArrayRecord as its distances ask for."""

    def __init__(self, layers: list[np.ndarray]):
        self.to_numpy_ndarrays = lambda: layers


def rules(rows: np.ndarray, f: int) -> dict[str, dict[str, Callable]]:
    """By rule and library a function without arguments, on updates (n, d) with f attackers."""
    n = len(rows)
    layers = [np.array_split(row, LAYERS) for row in rows]
    sent = [
        Update(i, {str(k): torch.from_numpy(part) for k, part in enumerate(each)}, 10) for i, each in enumerate(layers)
    ]
    results, records = [(each, 10) for each in layers], [Record(each) for each in layers]
    tensor, vectors = torch.from_numpy(rows), [torch.from_numpy(row) for row in rows]
    return {
        "FedAvg": {
            OURS: lambda: ours.fedavg(sent),
            "flwr": lambda: flower.aggregate(results),
            "byzfl, no weights": lambda: byzfl.Average()(tensor),
        },
        "median": {
            OURS: lambda: ours.median(sent),
            "flwr": lambda: flower.aggregate_median(results),
            "byzfl": lambda: byzfl.Median()(tensor),
            "byzpy": lambda: CoordinateWiseMedian().aggregate(vectors),
        },
        "trimmed mean": {
            OURS: lambda: ours.trimmed_mean(sent, trim=f),
            "flwr": lambda: flower.aggregate_trimmed_avg(results, f / n),
            "byzfl": lambda: byzfl.TrMean(f)(tensor),
            "byzpy": lambda: CoordinateWiseTrimmedMean(f).aggregate(vectors),
        },
        "Krum": {
            OURS: lambda: ours.krum(sent, n_malicious=f),
            "flwr": lambda: flower.aggregate_krum(results, f, 0),
            MESSAGES: lambda: compute_distances(records),
            "byzfl": lambda: byzfl.Krum(f)(tensor),
            "byzpy": lambda: MultiKrum(f, 1).aggregate(vectors),
        },
        "Multi-Krum": {
            OURS: lambda: ours.multi_krum(sent, n_malicious=f),
            "flwr": lambda: flower.aggregate_krum(results, f, n - f),
            "byzfl": lambda: byzfl.MultiKrum(f)(tensor),
            "byzpy": lambda: MultiKrum(f, n - f).aggregate(vectors),
        },
    }


def choices() -> list[dict]:
    """Whom Krum chooses, n = 10 with two attackers, against distances by subtraction in float64."""
    n, f, found = 10, 2, []
    for ratio in RATIOS:
        right = dict.fromkeys((OURS, "flwr", MESSAGES, "byzfl", "byzpy"), 0)
        for seed in range(DRAWS):
            rows = drawn(n, SMALL, ratio, seed)
            exact = np.square(rows[:, None].astype(np.float64) - rows[None]).sum(2)
            layers = [np.array_split(row, LAYERS) for row in rows]
            sent = [Update(i, {"w": torch.from_numpy(row)}, 10) for i, row in enumerate(rows)]
            rule, wider = (int(np.sort(exact, axis=1)[:, 1:end].sum(1).argmin()) for end in (n - f - 1, n - f))
            distances = compute_distances([Record(each) for each in layers])
            answers = {
                OURS: (ours.krum(sent, n_malicious=f)[0]["w"].numpy(), rule),
                "flwr": (np.concatenate(flower.aggregate_krum([(each, 10) for each in layers], f, 0)), rule),
                MESSAGES: (rows[int(np.sort(distances, axis=1)[:, 1 : n - f - 1].sum(1).argmin())], rule),
                "byzfl": (byzfl.Krum(f)(torch.from_numpy(rows)).numpy(), wider),
                "byzpy": (np.asarray(MultiKrum(f, 1).aggregate([torch.from_numpy(row) for row in rows])), wider),
            }
            for name, (chosen, expected) in answers.items():
                right[name] += int(np.array_equal(chosen, rows[expected]))
        what = f"Krum's choice, {n} clients, update/weight {ratio:.0e}"
        found += [{"what": what, "library": name, "result": f"right {k} of {DRAWS}"} for name, k in right.items()]
    return found


def main() -> None:
    one_thread()
    lines = choices()
    for n, d in SIZES:
        for rule, libraries in rules(drawn(n, d, 1e-2, 0), n // 4).items():
            lines += compared(f"{rule}, {n} clients, {d:,} parameters", libraries)
    write("aggregators", lines, ("numpy", "flwr", "byzfl", "byzpy"))


if __name__ == "__main__":
    main()
