"""The command line is run by `python -m autoparallel`, or `torchrun -m autoparallel`."""

from autoparallel.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
