"""medsec: attacks on medical-imaging AI and their defences, as published, repaired and tested.

To test something of your own: ``medsec.audit``, ``medsec.judge_server_rule``, ``medsec.judge_gradient_defence`` and
``medsec.judge_attack``; each returns a `medsec.judge.Report`.
"""

import os
import platform
import sys

__version__ = "0.1.0"

# Libraries choose their code by the processor: with AVX-512 a sum has other bits than with AVX2, and a network that is
# trained on them takes another path. All use the set that nearly every x86-64 processor has, so that a laptop and a
# server give the same tables. These are read when numpy and torch are first imported or used: import medsec before them.
PINNED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
}
if platform.machine() in ("x86_64", "AMD64") and os.environ.get("MEDSEC_INSTRUCTIONS") != "native":
    os.environ.update(PINNED)

# How a notebook shows its figures. An environment that names another backend (MPLBACKEND=Agg on clusters, in containers)
# would silently remove every one of them.
INLINE = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
if "ipykernel" in sys.modules:
    os.environ.update(INLINE)


def __getattr__(name: str):
    """The tests of one's own, loaded when they are asked for: `import medsec` alone loads neither numpy nor torch."""
    if name == "audit":
        from medsec.judge.classifier import audit as found
    elif name == "judge_server_rule":
        from medsec.judge.server import judge_server_rule as found
    elif name == "judge_gradient_defence":
        from medsec.judge.gradients import judge_gradient_defence as found
    elif name == "judge_attack":
        from medsec.judge.attack import judge_attack as found
    else:
        raise AttributeError(f"module 'medsec' has no attribute {name!r}")
    return found
