"""Start, log lines and exit codes of every command."""

import contextlib
import errno
import functools
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from logging import WARNING, Formatter, LogRecord
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

from ema_jax.errors import RunStoppedError, UserError
from ema_jax.runtime import compilation, hardware, signals, xla_flags
from ema_jax.runtime.disk import full_disk

_LONGEST_LINE = 1000
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
# Its threads log with a traceback what this project reports in one line.
_ORBAX = f"{os.sep}orbax{os.sep}"
# Of the system's errors those that are faults of the environment: a missing file is a bug here, as
# every file of a user is looked for before.
_ENVIRONMENT = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY, errno.EBUSY, errno.ETXTBSY, errno.EXDEV),
    *(errno.ENXIO, errno.ENODEV, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE),
}
# Of XLA's allocators, and of a TPU's compiler.
_NO_MEMORY = re.compile(r"(?<=RESOURCE_EXHAUSTED: ).*(out of memory|allocat).*", re.I)
_PLATFORMS = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES")
# Where JAX starts its backends, and where it reads its variables.
_JAX_BACKENDS, _JAX_SETTINGS = (
    f"{os.sep}jax{os.sep}_src{os.sep}{n}.py" for n in ("xla_bridge", "config")
)


def run(
    main: Callable[[Sequence[str]], int | None],
    *,
    kept: str = "what it was writing is not there; the same command starts again",
    positional: bool = False,
) -> NoReturn:
    """Runs a command's `main` under absl and exits with the project's codes.

    Flags are declared (absl) before the call. Exits 0 on success and for `--help`, 2 with one line
    `error: …` on stderr for a bad flag or a `UserError`, 3 with `stopped: …` for a
    `RunStoppedError`, a full disk or device, SIGTERM or Ctrl-C. Any other exception is a bug and
    keeps its traceback. Logs go to stderr as `HH:MM:SS message`.

    Args:
        main: takes the program's name and the arguments that are no flags, and returns an exit code
            or None.
        kept: what is left of a command that was asked to stop, and how to resume.
        positional: whether the command takes arguments that are no flags; by default they are
            refused.
    """
    # XLA's C++ log would print its own banner before the project's first line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    quiet_libtpu()

    def begin(argv: Sequence[str]) -> int | None:
        xla_flags.check()  # not before the flags are read: help is there at once
        return main(argv)

    with exit_codes(kept):
        app.run(begin, flags_parser=functools.partial(_parse_flags, positional=positional))
    sys.exit(0)


@contextlib.contextmanager
def exit_codes(kept: str) -> Iterator[None]:
    """Ends the process with the project's codes and one line for what a command may raise.

    SIGTERM and Ctrl-C raise from here on. The arguments are those of `run`.
    """
    asked: list[type[signals.StopRequested]] = []
    try:
        asked = signals.raise_on_signals()
        try:
            yield
        finally:
            sys.stdout.flush()  # at the interpreter's end nobody handles what it raises
    except UserError as error:
        exit_with("error", error, UserError.exit_code)
    except RunStoppedError as error:
        exit_with("stopped", error, RunStoppedError.exit_code)
    except KeyboardInterrupt as stop:
        by = stop.by if isinstance(stop, signals.StopRequested) else signals.StopRequested.by
        exit_with("stopped", f"asked to stop ({by}); {kept}", RunStoppedError.exit_code)
    except BrokenPipeError:  # `… | head` reads no further
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor at the last flush
        sys.exit(0)
    except Exception as error:
        if asked:
            exit_with("stopped", f"asked to stop ({asked[-1].by}); {kept}", 3)
        _exit_of(error, kept)
        raise


def _exit_of(error: Exception, kept: str) -> None:
    """Ends the process for what the system or the environment is to blame for; else returns."""
    if isinstance(error, OSError):
        place = error.filename or "the disk"
        if (code := full_disk(error)) is not None:
            exit_with("stopped", f"{place}: {os.strerror(code)}; {kept}, once there is room", 3)
        if error.errno in _ENVIRONMENT:
            exit_with("error", f"{place}: {error.strerror}", UserError.exit_code)
    if isinstance(error, RuntimeError) and (found := _NO_MEMORY.search(str(error))):
        exit_with(
            "stopped",
            f"the memory of a device is full ({found[0]:.200}); {kept}, with settings that need "
            "less (generation.batch_size, unlearn.remat, unlearn.accumulate) or, on a GPU, with "
            "more of its memory (XLA_PYTHON_CLIENT_MEM_FRACTION=0.95); see docs/one-gpu.md",
            RunStoppedError.exit_code,
        )
    known = isinstance(error, RuntimeError | ValueError | AssertionError)
    if known and (fault := _jax_environment(error)):
        exit_with("error", fault, UserError.exit_code)


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
    if not hardware.has_tpu():
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def keep_compiled_programs() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second run starts at once.

    JAX's own `JAX_COMPILATION_CACHE_DIR` names another folder; empty, it keeps nothing.
    """
    given = "JAX_COMPILATION_CACHE_DIR" in os.environ
    compilation.keep_programs(None if given else compiled_programs())


def compiled_programs() -> Path | None:
    """The folder where compiled programs are kept; None where none are."""
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given is not None:
        return Path(given) if given else None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ema_jax" / "xla"


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


def require(*names: str) -> None:
    """Makes flags required: a command ends in one line without them."""
    _required.extend(names)


def explain(more: Callable[[], str]) -> None:
    """Adds a paragraph to the command's help, made when it is asked for."""
    _explanations.append(more)


def fields_of(flag: str) -> list[tuple[str, str | None]]:
    """`--FLAG.FIELD=VALUE` of the command line, in order; None for a bare `--FLAG.FIELD`."""
    return [(field, value) for name, field, value in _fields if name == flag]


_required: list[str] = []
_explanations: list[Callable[[], str]] = []
_fields: list[tuple[str, str, str | None]] = []
_FIELD = re.compile(r"--?(no)?(\w+)\.([\w.-]+)(?:=(.*))?", re.S)


def _parse_flags(argv: Sequence[str], *, positional: bool) -> list[str]:
    log_to_stderr()
    if any(argument in ("--help", "-help", "-h") for argument in argv[1:]):
        print(_help())
        sys.exit(0)
    try:
        rest = flags.FLAGS(_without_fields(argv))
    except SystemExit:  # --helpfull and similar flags, for which absl exits 1
        sys.exit(0)
    except flags.Error as error:
        raise UserError(f"{error} (--help lists the flags)") from None
    if len(rest) > 1 and not positional:
        raise UserError(_unexpected(rest[1]))
    for flag in _own_flags():
        _check_given(flag)
    return rest


def _without_fields(argv: Sequence[str]) -> list[str]:
    """The arguments without those of the form `--FLAG.FIELD`, which are kept for `fields_of`."""
    _fields.clear()
    rest: list[str] = []
    left = list(argv)
    while left:
        argument = left.pop(0)
        if argument == "--":
            return [*rest, argument, *left]
        found = _FIELD.fullmatch(argument)
        if found is None or found[2] not in flags.FLAGS:
            rest.append(argument)
            continue
        no, flag, field, value = found.groups()
        if no:
            value = "false"
        elif value is None and left and not left[0].startswith("--"):
            value = left.pop(0)
        _fields.append((flag, field, value))
    return rest


def _own_flags() -> list[flags.Flag]:
    """The command's flags, without absl's."""
    modules = flags.FLAGS.flags_by_module_dict().items()
    return [flag for name, found in modules if not name.startswith("absl") for flag in found]


def _check_given(flag: flags.Flag) -> None:
    """Refuses a required flag that is not there, and one that is given without a value."""
    value = flag.value
    texts = value if isinstance(value, list) else [value]
    if value is None and flag.name in _required:
        raise UserError(f"--{flag.name} is required: give --{flag.name}=VALUE (--help lists more)")
    if flag.present and flag.default is None and not any(str(text).strip() for text in texts):
        fix = "" if flag.name in _required else " or leave it out"
        raise UserError(f"--{flag.name} is empty: give --{flag.name}=VALUE{fix}")


def _unexpected(argument: str) -> str:
    """The line for an argument that is no flag; what it looks like, it was probably meant for."""
    given = flags.FLAGS
    meant = "name=value"
    if "config" in given and given["config"].value is None:
        meant = f"config={argument}"
    elif "workdir" in given and given["workdir"].value is None:
        meant = f"workdir={argument}"
    elif argument.partition("=")[0] in given:
        meant = argument
    elif argument.startswith("config."):
        meant = argument if "=" in argument else f"{argument}=VALUE"
    return f"unexpected argument {argument!r}: flags are written --name=value; write --{meant}"


def _help() -> str:
    """What the command does, its flags, and what `explain` was given."""
    program = getattr(sys.modules["__main__"], "__doc__", None) or ""
    lines = [program.strip(), "", "Flags:"]
    for flag in _own_flags():
        boolean = flag.boolean
        default = "" if flag.value in (None, False, []) else f"; default {flag.default_as_str}"
        needed = " (required)" if flag.name in _required else ""
        lines.append(f"  --{flag.name}{'' if boolean else '=…'}{needed}")
        lines += textwrap.wrap(
            f"{flag.help}{default}", 96, initial_indent=" " * 8, subsequent_indent=" " * 8
        )
    return "\n".join([*lines, *("\n" + more() for more in _explanations)])


def exit_with(kind: str, message: object, code: int) -> NoReturn:
    """Ends the process with one line on stderr, `kind: message`."""
    line = " ".join(str(message).split())
    if len(line) > _LONGEST_LINE:  # it quotes a value of a file, whatever its size
        line = f"{line[:_LONGEST_LINE]}…"
    print(f"{kind}: {line}", file=sys.stderr)
    sys.exit(code)
