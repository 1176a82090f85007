"""``python -m adaptsurgery``."""

from adaptsurgery.cli import main

if __name__ == "__main__":
    main()
