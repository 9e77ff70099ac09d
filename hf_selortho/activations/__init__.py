"""The report of `hf_selortho.data.cache_report` under its earlier name, `python -m hf_selortho.activations.report`."""
