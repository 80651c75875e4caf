"""Evaluates the features of any method: `python -m models.eval FEATURES`, see models.eval.command."""

from utils.cli import run_command


def main(argv=None):
    """Command line. The command is a module of its own, which run_command imports with signals blocked."""
    return run_command("models.eval.command", argv)


if __name__ == "__main__":
    main()
