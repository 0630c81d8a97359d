"""Code shared by the launchers, which need only Python: neither JAX nor the project installed."""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]

# Google Cloud's and Kubernetes' own rules for names, a little stricter.
NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"
ZONE = r"[a-z]+-[a-z]+\d+-[a-z]"
PROJECT = r"[a-z][-a-z0-9]{4,28}[a-z0-9]"
SECRET = r"[a-zA-Z][-a-zA-Z0-9_]{0,100}"


def fail(message: str) -> NoReturn:
    """Prints one line on stderr and exits with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def matching(pattern: str, like: str) -> Callable[[str], str]:
    """An argparse type: text that matches the whole pattern; `like` is an example of it."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not valid here; write it like {like}")
        return text

    return check


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message as one line and exits with code 2."""
        fail(message)


class Shell:
    """Runs commands, or prints them."""

    def __init__(self, *, dry_run: bool):
        self.dry_run = dry_run

    def run(self, command: Sequence[str], *, stdin: str | None = None) -> int:
        """Runs a command with its output shown; returns its exit code (0 in a dry run)."""
        if self.dry_run:
            print(shlex.join(command))
            if stdin is not None:
                print(stdin, end="")
            return 0
        return subprocess.run(command, input=stdin, text=True, check=False).returncode

    def must(self, command: Sequence[str], what: str, *, stdin: str | None = None) -> None:
        """Runs a command and exits with code 2 if it fails; `what` says what it is for."""
        code = self.run(command, stdin=stdin)
        if code:
            fail(f"{what} failed: {command[0]} exited with {code} (its own message is above)")

    def ask(self, command: Sequence[str], otherwise: str = "") -> str | None:
        """A command's output; None if it fails, `otherwise` in a dry run."""
        if self.dry_run:
            print(shlex.join(command))
            return otherwise
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None
