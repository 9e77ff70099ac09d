"""`python -m hf_selortho train ...` does what `selortho train ...` does."""

from .commands.main import main

if __name__ == "__main__":
    main()
