"""How a command ends: what a user can mend is one sentence on stderr, and the status says how it went.

Nothing slow is imported here, so that `--help` and typing errors answer at once.
"""

import sys
from collections.abc import Callable


def exit_status(
    work: Callable[[], int | None],
    interrupted: str = "",
    mendable: tuple[type[Exception], ...] = (ValueError, OSError),
) -> int:
    """Do the work of a command.

    Args:
        work: returns the status; None: 0.
        interrupted: the sentence on stderr for who stops it (Ctrl-C); empty: none.
        mendable: errors that become "error: …" on stderr; any other is a mistake of the code and keeps its traceback.

    Returns:
        The work's status, 1 after a mendable error, 130 after an interruption.
    """
    try:
        return work() or 0
    except mendable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if interrupted:
            print(f"\n{interrupted}", file=sys.stderr)
        return 130
