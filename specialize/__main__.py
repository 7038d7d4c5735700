"""``python -m specialize``: the command line where a module is asked for, as by torchrun."""

from .cli import main

if __name__ == "__main__":
    main()
