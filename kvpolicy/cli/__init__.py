"""The command line: `kvpolicy` and `python -m kvpolicy`."""


def main() -> None:
    """Run the command on the command line; exits with 0, 1 (a checked file is bad) or 2 (bad input)."""
    from kvpolicy.cli.app import app

    app(prog_name="kvpolicy")
