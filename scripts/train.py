"""Train SAEs: what `selortho train` does, as a file for `accelerate launch scripts/train.py` and `torchrun`."""

from hf_selortho.commands.train import main
from hf_selortho.utils.command_line import run_script

if __name__ == "__main__":
    run_script(main)
