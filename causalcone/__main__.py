"""``python -m causalcone`` and the ``causalcone`` command."""

from causalcone.runners.commands.app import main

if __name__ == "__main__":
    main()
