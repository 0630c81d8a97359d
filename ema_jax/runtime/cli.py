"""Start, log lines and exit codes of every command."""

import errno
import glob
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from logging import WARNING, Formatter, LogRecord
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

from ema_jax.errors import RunStoppedError, UserError
from ema_jax.runtime import signals
from ema_jax.runtime.files import full_disk

_LONGEST_LINE = 1000
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
# Its threads log with a traceback what this project reports in one line.
_ORBAX = f"{os.sep}orbax{os.sep}"
_MISSING_FLAG = re.compile(r"flag --(\S+)=None: Flag --\1 must have a value other than None\.")
_TRACEBACK = "Traceback (most recent call last):"
# Chips up to v4, and later ones (as any device that is passed through).
_TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")
# Of the system's errors those that are faults of the environment: a missing file is a bug here, as
# every file of a user is looked for before.
_ENVIRONMENT = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY, errno.EBUSY, errno.ETXTBSY, errno.EXDEV),
    *(errno.ENXIO, errno.ENODEV, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE),
}
_PLATFORMS = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES")
# Where JAX starts its backends, and where it reads its variables.
_JAX_BACKENDS, _JAX_SETTINGS = (
    f"{os.sep}jax{os.sep}_src{os.sep}{n}.py" for n in ("xla_bridge", "config")
)


def run(
    main: Callable[[Sequence[str]], int | None],
    *,
    kept: str = "what it was writing is not there; the same command starts again",
) -> NoReturn:
    """Runs a command's `main` under absl and exits with the project's codes.

    Flags are declared (absl) before the call. Exits 0 on success and for `--help`, 2 with one line
    `error: …` on stderr for a bad flag or a `UserError`, 3 with `stopped: …` for a
    `RunStoppedError`, a full disk, SIGTERM or Ctrl-C. Any other exception is a bug and keeps its
    traceback. Logs go to stderr as `HH:MM:SS message`.

    Args:
        main: takes the leftover arguments (always only the program's name, as anything that is not
            a flag is refused) and returns an exit code or None.
        kept: what is left of a command that was asked to stop, and how to resume.
    """
    # XLA's C++ log would print its own banner before the project's first line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    quiet_libtpu()
    try:
        signals.raise_on_signals()
        app.run(main, flags_parser=_parse_flags)
    except UserError as error:
        exit_with("error", error, UserError.exit_code)
    except RunStoppedError as error:
        exit_with("stopped", error, RunStoppedError.exit_code)
    except KeyboardInterrupt as asked:
        by = asked.by if isinstance(asked, signals.StopRequested) else signals.StopRequested.by
        exit_with("stopped", f"asked to stop ({by}); {kept}", RunStoppedError.exit_code)
    except OSError as error:
        place = error.filename or "the disk"
        if (code := full_disk(error)) is not None:
            exit_with("stopped", f"{place}: {os.strerror(code)}; {kept}, once there is room", 3)
        if error.errno in _ENVIRONMENT:
            exit_with("error", f"{place}: {error.strerror}", UserError.exit_code)
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        if fault := _jax_environment(error):
            exit_with("error", fault, UserError.exit_code)
        raise
    sys.exit(0)


def _jax_environment(error: Exception) -> str:
    """Says which variable of the environment keeps JAX from starting; "" for another error."""
    raised_in = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        raised_in = frame.f_code.co_filename
    said = str(error).partition("(set JAX_PLATFORMS")[0].strip()[:300]
    if raised_in.endswith(_JAX_BACKENDS):
        given = [f"{n}={os.environ[n]!r:.80}" for n in _PLATFORMS if os.environ.get(n)]
        which = f"{' '.join(given)}: " if given else ""
        return (
            f"{which}JAX starts no device ({said or 'none of that kind'}); name platforms that "
            "this machine and this JAX have (JAX_PLATFORMS=cpu, cuda or tpu), or none"
        )
    named = [name.upper() for name in re.findall(r"jax_\w+", said, re.IGNORECASE)]
    if raised_in.endswith(_JAX_SETTINGS) and any(name in os.environ for name in named):
        return f"{said}; correct {named[0]} in the environment, or unset it"
    return ""


def quiet_libtpu() -> None:
    """Keeps libtpu, where it is installed and no TPU is, from printing errors; before JAX starts.

    JAX asks every installed backend for devices. libtpu prints alarming lines, past all log levels,
    if it cannot tell which TPU it is on; given one, it finds no device and prints nothing.
    """
    if not any(glob.glob(pattern) for pattern in _TPU_DEVICES):
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def keep_compiled_programs() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second run starts at once.

    JAX's own `JAX_COMPILATION_CACHE_DIR` names another folder; empty, it keeps nothing.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        import jax

        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "ema_jax" / "xla"))


def log_to_stderr() -> None:
    """Sends log lines to stderr as `HH:MM:SS message`.

    Lines below a warning are shown only when they are the project's own, because libraries log
    much at that level; `--verbosity=1` shows all.
    """
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    handler.setFormatter(_LineFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_worth_showing)


class _LineFormatter(Formatter):
    def formatMessage(self, record: LogRecord) -> str:  # noqa: N802 (logging's name)
        if record.levelno >= WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


def _worth_showing(record: LogRecord) -> bool:
    own = record.pathname.startswith(_PACKAGE)
    warning = record.levelno >= WARNING and _ORBAX not in record.pathname
    return own or warning or logging.get_verbosity() > logging.INFO


def _parse_flags(argv: Sequence[str]) -> list[str]:
    log_to_stderr()
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:  # --help and similar flags, for which absl exits 1
        sys.exit(0)
    except flags.Error as error:
        message = _MISSING_FLAG.sub(r"--\1 is required: give --\1=VALUE", str(error))
        if _TRACEBACK in message:
            # A config file's own error comes with its traceback: the last line is the message.
            before, _, trace = message.partition(_TRACEBACK)
            message = f"{before.rstrip()} {trace.strip().splitlines()[-1]}"
        raise UserError(f"{message} (--help lists the flags)") from None
    except UserError:
        raise
    except AttributeError as error:
        # What ml_collections raises for --config.FIELD=… of a field that is not there.
        words = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").strip("'\"").split())
        raise UserError(f"--config: unknown field {words}") from None
    except Exception as error:
        # A config file is read while flags are parsed, and may raise whatever it likes.
        raise UserError(f"flags: {type(error).__name__}: {error}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    return rest


def exit_with(kind: str, message: object, code: int) -> NoReturn:
    """Ends the process with one line on stderr, `kind: message`."""
    line = " ".join(str(message).split())
    if len(line) > _LONGEST_LINE:  # it quotes a value of a file, whatever its size
        line = f"{line[:_LONGEST_LINE]}…"
    print(f"{kind}: {line}", file=sys.stderr)
    sys.exit(code)
