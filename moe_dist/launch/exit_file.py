"""The exit code of a run as its ranks say it: launchers turn theirs into 1, or into 0 where a rank was killed."""

import os

from moe_dist.errors import EXIT_OK

EXIT_FILE = "MOE_DIST_EXIT_FILE"  # the variable that names the file


def leave_exit_code(code: int) -> None:
    """Tell whoever started the run how it ended: the first failing rank counts, rank 0 speaks for success."""
    path = os.environ.get(EXIT_FILE)
    if path and (code != EXIT_OK or os.environ.get("RANK", "0") == "0"):
        try:
            with open(path, "x") as file:
                file.write(str(code))
        except OSError:
            pass  # another rank was first, or the folder is gone: the launcher's own exit code is left
