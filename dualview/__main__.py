"""The script `dualview`, and `python -m dualview`: the command, also where it is interrupted while it is loaded."""

import sys


def main() -> int:
    """Run the command with the arguments of the process and return its exit code."""
    try:
        from dualview.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("dualview: error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
