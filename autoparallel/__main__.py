"""`python -m autoparallel`, and under a launcher `torchrun -m autoparallel`."""

from autoparallel.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
