"""`python -m dpoeng` is the command `dpoeng`."""

from dpoeng.cli.main import main

if __name__ == "__main__":
    main()
