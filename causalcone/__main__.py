"""``python -m causalcone`` and the ``causalcone`` command."""

from causalcone.runners.cli import main

if __name__ == "__main__":
    main()
