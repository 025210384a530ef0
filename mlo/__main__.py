"""`python -m mlo`."""

from mlo.cli import main

if __name__ == "__main__":
    main()
