"""SAEs in the formats of other libraries: read to be evaluated, published and inspected here; written for SAELens."""

from .load import FORMATS, load_sae
from .saelens import write_saelens

__all__ = ["FORMATS", "load_sae", "write_saelens"]
