"""``python -m graftwork``, which launchers such as torchrun need, is the command ``trainer``."""

from graftwork.cli import main

if __name__ == "__main__":
    main()
