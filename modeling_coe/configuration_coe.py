"""Re-exports the configuration under the name a saved folder gives it.

Folders that carry their own code are flat: there, `configuration_coe.py` is the configuration itself. Importing it
from here as `.configuration_coe` makes `modeling_coe.py` run unchanged in both places.
"""

from configuration_coe import BACKBONES, CoeConfig


__all__ = ["BACKBONES", "CoeConfig"]
