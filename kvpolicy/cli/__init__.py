"""The command line: `kvpolicy` and `python -m kvpolicy`."""


def main() -> None:
    """Run the command on the command line; exits with 0, 1 (a checked file is bad), 2 (bad input) or 130 (Ctrl-C)."""
    try:
        from kvpolicy.cli.app import app

        app(prog_name="kvpolicy")
    except KeyboardInterrupt:  # before there is a command
        raise SystemExit(130) from None
