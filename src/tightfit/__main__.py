"""`python -m tightfit`, the same as `tightfit`."""

from tightfit.cli import main

if __name__ == "__main__":
    main()
