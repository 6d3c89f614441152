"""One folder a notebook: what it runs and shows."""

import medsec  # noqa: F401  (pins the instruction set, before numpy and torch)
