"""Cache activations: what `selortho cache` does, as a file for `torchrun` and `accelerate launch`."""

from hf_selortho.commands.cache import main
from hf_selortho.utils.command_line import run_script

if __name__ == "__main__":
    run_script(main)
