"""Report on cached activations: `python -m hf_selortho.activations.report FOLDER --output norms.png`."""

from ..data.cache_report import main
from ..utils.command_line import run_script

if __name__ == "__main__":
    run_script(main)
