"""Server rules: ours and those of other libraries, on the same updates, and who chooses rightly.

``make bench`` runs it in an environment of its own. On one thread every rule runs once to warm up, then the libraries take turns
over `REPEATS`. It writes ``benchmarks/aggregators.csv``: the median of the seconds and, of Krum, in how many of `DRAWS`
the chosen update is the one that distances in float64 choose, for updates ever smaller against the weights.

Flower takes a list of layers, byzfl one vector a client; ours a dictionary of tensors. What it takes to bring the
updates into that form is not timed. Flower adds up in float32, ours in float64.
"""

import platform
import statistics
import time
from importlib.metadata import version

import byzfl
import numpy as np
import pandas as pd
import torch
from flwr.server.strategy import aggregate as flower
from flwr.serverapp.strategy.multikrum import compute_distances

from medsec.core import paths
from medsec.evidence.record import processor
from medsec.federated import aggregators as ours
from medsec.federated.rounds import Update

RESULT = paths.ROOT / "benchmarks" / "aggregators.csv"
CLIENTS, PARAMETERS, LAYERS, REPEATS = (8, 64), 1_000_000, 10, 5
RATIOS, DRAWS, SMALL = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6), 10, 20_000


def drawn(n: int, d: int, ratio: float, seed: int) -> np.ndarray:
    """(n, d) float32: common weights of size 1, and of each client an update of size ``ratio``, larger from one to the next."""
    rng = np.random.default_rng(seed)
    size = ratio * (1 + 0.02 * rng.permutation(n))[:, None]
    return (rng.standard_normal(d) + size * rng.standard_normal((n, d))).astype(np.float32)


class Record:
    """As much of Flower's ArrayRecord as its distances ask for."""

    def __init__(self, layers: list[np.ndarray]):
        self.to_numpy_ndarrays = lambda: layers


def rules(rows: np.ndarray, f: int) -> dict[str, dict]:
    """By rule and library a function without arguments, on updates (n, d) with f attackers."""
    n = len(rows)
    layers = [np.array_split(row, LAYERS) for row in rows]
    sent = [
        Update(i, {str(k): torch.from_numpy(part) for k, part in enumerate(each)}, 10) for i, each in enumerate(layers)
    ]
    results = [(each, 10) for each in layers]
    tensor = torch.from_numpy(rows)
    return {
        "FedAvg": {
            "medsec": lambda: ours.fedavg(sent),
            "flwr": lambda: flower.aggregate(results),
            "byzfl": lambda: byzfl.Average()(tensor),
        },
        "median": {
            "medsec": lambda: ours.median(sent),
            "flwr": lambda: flower.aggregate_median(results),
            "byzfl": lambda: byzfl.Median()(tensor),
        },
        "trimmed mean": {
            "medsec": lambda: ours.trimmed_mean(sent, trim=f),
            "flwr": lambda: flower.aggregate_trimmed_avg(results, f / n),
            "byzfl": lambda: byzfl.TrMean(f)(tensor),
        },
        "Krum": {
            "medsec": lambda: ours.krum(sent, n_malicious=f),
            "flwr": lambda: flower.aggregate_krum(results, f, 0),
            "flwr, Message API": lambda: compute_distances([Record(each) for each in layers]),
            "byzfl": lambda: byzfl.Krum(f)(tensor),
        },
    }


def times() -> list[dict]:
    found = []
    for n in CLIENTS:
        f = n // 4
        for rule, libraries in rules(drawn(n, PARAMETERS, 1e-2, 0), f).items():
            seconds: dict[str, list[float]] = {name: [] for name in libraries}
            for repeat in range(REPEATS + 1):
                for name, call in libraries.items():
                    start = time.perf_counter()
                    call()
                    if repeat:
                        seconds[name].append(time.perf_counter() - start)
            fastest = min(statistics.median(s) for name, s in seconds.items() if name != "medsec")
            for name, each in seconds.items():
                median = statistics.median(each)
                found.append({"what": rule, "clients": n, "library": name, "seconds": round(median, 4)})
                found[-1]["of the fastest other"] = round(median / fastest, 2)
    return found


def choices() -> list[dict]:
    """Whom Krum chooses, n = 10 with two attackers, against distances by subtraction in float64."""
    n, f, found = 10, 2, []
    for ratio in RATIOS:
        right = dict.fromkeys(("medsec", "flwr", "flwr, Message API", "byzfl"), 0)
        for seed in range(DRAWS):
            rows = drawn(n, SMALL, ratio, seed)
            exact = np.square(rows[:, None].astype(np.float64) - rows[None]).sum(2)
            layers = [np.array_split(row, LAYERS) for row in rows]
            sent = [Update(i, {"w": torch.from_numpy(row)}, 10) for i, row in enumerate(rows)]
            answers = {
                "medsec": ours.krum(sent, n_malicious=f)[0]["w"].numpy(),
                "flwr": np.concatenate(flower.aggregate_krum([(each, 10) for each in layers], f, 0)),
                "flwr, Message API": rows[best(compute_distances([Record(each) for each in layers]), f)],
            }
            for name, chosen in answers.items():
                right[name] += int(np.array_equal(chosen, rows[best(exact, f)]))
            # byzfl counts one neighbour more: it is judged by its own rule.
            own = np.sort(exact, axis=1)[:, 1 : n - f].mean(1).argmin()
            right["byzfl"] += int(np.array_equal(byzfl.Krum(f)(torch.from_numpy(rows)).numpy(), rows[own]))
        found += [
            {"what": f"Krum right, update/weight {ratio:.0e}", "clients": n, "library": name, "right": k, "of": DRAWS}
            for name, k in right.items()
        ]
    return found


def best(distance: np.ndarray, f: int) -> int:
    """Krum's choice from squared distances: the diagonal is left out, as smallest of each row."""
    return int(np.sort(distance, axis=1)[:, 1 : len(distance) - f - 1].sum(1).argmin())


def main() -> None:
    torch.set_num_threads(1)
    table = pd.DataFrame([*times(), *choices()])
    made = {name: version(name) for name in ("flwr", "byzfl", "numpy", "torch")}
    table["made with"] = ", ".join([processor(), platform.python_version(), *(f"{k} {v}" for k, v in made.items())])
    table.to_csv(RESULT, index=False)
    print(table.drop(columns="made with").to_string(index=False))


if __name__ == "__main__":
    main()
