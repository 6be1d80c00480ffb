"""`python -m atesd`, for `accelerate launch -m atesd train ...` and environments without the script on the path."""

from atesd.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
