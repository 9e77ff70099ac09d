"""What the scripts share: an error of the user's is one line and exit code 2, and the log is readable."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from .errors import SelOrthoError


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function; exits with 2 and one line on standard error if the user can mend what is wrong."""
    _set_up_logging()
    try:
        main()
    except SelOrthoError as error:
        line = " ".join(str(error).split())
        sys.stderr.write(f"{os.path.basename(sys.argv[0])}: error: {line}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def _set_up_logging() -> None:
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("hf_selortho").setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of weights that load in a second
