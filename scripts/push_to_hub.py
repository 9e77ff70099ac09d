"""What `selortho push` does, as a file."""

from hf_selortho.commands.push import main
from hf_selortho.utils.command_line import run_script

if __name__ == "__main__":
    run_script(main)
