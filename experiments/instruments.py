"""Networks that many cells measure with, such as a feature extractor: trained once, kept beside the finished cells.

Worker processes and notebooks find it below ``.cells/<cohort>/instruments/``, by a hash of what decides it.
``MEDSEC_FRESH=1`` trains it anew.
"""

import sys
from collections.abc import Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as packed
from torch import nn

from medsec import data
from medsec.core import files, paths
from medsec.evidence import cells

GENERATION = 1  # raised by hand when an instrument's training changes


def trained(
    cohort: data.Cohort, name: str, decides: dict, new: Callable[[], nn.Module], train: Callable[[], nn.Module]
) -> nn.Module:
    """The network that ``train()`` gives, in evaluation mode: from disk where it was trained before, else now.

    Args:
        cohort: whose images it is trained on.
        name: of the file.
        decides: parameters and seeds that decide its weights, as JSON.
        new: an untrained network of the same shape.
        train: trains it.
    """
    what = {"generation": GENERATION, "cohort": cohort.fingerprint, "size": cohort.size, "name": name, **decides}
    file = paths.cells(cohort.name) / "instruments" / f"{name}.{cells.digest(what)}.safetensors"
    if file.is_file() and not paths.flag("MEDSEC_FRESH"):
        try:
            with torch.random.fork_rng(devices=[]):  # untrained weights are drawn from the global stream
                model = new()
            model.load_state_dict(load_file(file))
            return model.eval()
        except (OSError, SafetensorError, RuntimeError) as error:  # the last: of weights that do not fit
            print(f"{file.name} cannot be read ({type(error).__name__}); it is trained again", file=sys.stderr)
    model = train()
    files.write(file, packed({key: value.contiguous().cpu() for key, value in model.state_dict().items()}))
    return model
