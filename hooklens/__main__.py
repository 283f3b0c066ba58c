"""`python -m hooklens` is the command `hooklens`."""

from hooklens.cli import main

if __name__ == "__main__":
    main()
