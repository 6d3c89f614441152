"""What a threat model says; the texts belong to the experiments."""

from dataclasses import dataclass, fields

import pandas as pd

__all__ = ["ThreatModel", "side_by_side"]


@dataclass(frozen=True)
class ThreatModel:
    """One attacker: what it wants, knows and can do, and what the defender sees. Every field is a sentence."""

    name: str
    goal: str
    knowledge: str
    capability: str
    defender_sees: str
    out_of_scope: str


def side_by_side(*models: ThreatModel) -> pd.DataFrame:
    """Threat models as columns, one row a question; ready for `medsec.evidence.tables.markdown`."""
    rows = [f.name for f in fields(ThreatModel) if f.name != "name"]
    table = {"": [row.replace("_", " ") for row in rows]}
    table |= {model.name: [getattr(model, row) for row in rows] for model in models}
    return pd.DataFrame(table)
