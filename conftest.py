"""Read before any test, and before a replayed notebook starts its kernel: medsec pins the instruction set."""

import medsec  # noqa: F401
