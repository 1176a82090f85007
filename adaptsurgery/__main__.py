"""``python -m adaptsurgery``, and the script: Ctrl-C is answered before anything is imported."""

import os

INTERRUPTED = 130


def main() -> None:
    """Run the command line; a Ctrl-C while it is still being imported leaves 130 and a line."""
    try:
        import signal

        usual = signal.getsignal(signal.SIGINT)
        if usual is signal.default_int_handler:  # else whoever started this has other wishes
            signal.signal(signal.SIGINT, _leave)
        from adaptsurgery.cli.app import main as command

        signal.signal(signal.SIGINT, usual)
        command()
    except KeyboardInterrupt:
        _leave()


def _leave(*_: object) -> None:
    """End at once, where nothing has begun: an import that is cut short cannot be cleaned up."""
    try:
        os.write(2, b"interrupted; nothing was left behind\n")
    except OSError:
        pass
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
