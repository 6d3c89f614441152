"""medsec: attacks on medical-imaging AI and their defences, as published, repaired and tested."""

__version__ = "0.1.0"
