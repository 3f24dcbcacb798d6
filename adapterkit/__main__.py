"""`adapterkit` and `python -m adapterkit`."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; importing it takes a while, in which Ctrl-C may come too."""
    try:
        from adapterkit.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
