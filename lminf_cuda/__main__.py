"""python -m lminf_cuda is the command lminf."""

from lminf_cuda.cli import main

if __name__ == "__main__":
    main()
