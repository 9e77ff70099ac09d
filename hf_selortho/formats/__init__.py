"""SAEs in the formats of other libraries: read to be evaluated, published and inspected here; written for SAELens."""

from .load import FORMATS, load_gemma_scope, load_sae, load_saelens, load_sparsify
from .saelens import write_saelens

__all__ = ["FORMATS", "load_gemma_scope", "load_sae", "load_saelens", "load_sparsify", "write_saelens"]
