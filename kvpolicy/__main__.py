"""`python -m kvpolicy`."""

from kvpolicy.cli import main

if __name__ == "__main__":
    main()
