"""Program: renders chat templates for the process that started it, within time and memory.

Reads requests from stdin and writes replies to stdout, each one line of JSON. It imports nothing of
the package, so that it starts at once (`templates.py` starts it by its path). Templates see what
they see in transformers, but for a clock that stands still.
"""

import contextlib
import datetime
import functools
import json
import signal
import sys
from typing import Any, NoReturn

from jinja2 import Template, exceptions, ext, nodes, sandbox, utils
from jinja2.parser import Parser

SECONDS = 1
"""Processor time of one rendering, the template's compilation included."""

MEBIBYTES = 512
"""Memory of this process."""

CHARACTERS = 1 << 20
"""Most text that a template may add to the messages."""


class Generation(ext.Extension):
    """`{% generation %}`, which marks what the assistant says: rendered as if it was not there."""

    tags = {"generation"}  # noqa: RUF012 (as in its base)

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's body, with a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


class Dictionary:
    """`dict`, without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        """A dictionary."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        """A dictionary of these keys."""
        return dict.fromkeys(*args)


class Namespace(utils.Namespace):
    """`namespace`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):
        self, *rest = args
        utils.Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        """Sets an attribute."""
        if str(name).startswith("_"):
            raise exceptions.SecurityError(f"a namespace takes no name such as {name!r}")
        super().__setitem__(name, value)


def raise_exception(message: str) -> NoReturn:
    """Lets a template refuse its messages."""
    raise exceptions.TemplateError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON with HTML's characters as they are."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache
def compiled(template: str, day: str) -> Template:
    """The template in transformers' environment, on an ISO date."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": datetime.datetime.fromisoformat(day).strftime,
        "dict": Dictionary(),
        "namespace": Namespace,
    }
    return environment.from_string(template)


def reply(request: dict[str, Any]) -> dict[str, str]:
    """`{"text": …}`, `{"error": …}` of the template's own, or `{"limit": …}` that it passed."""
    try:
        template = compiled(request["template"], request["day"])
        text = template.render(request["variables"])
    except MemoryError:
        return {"limit": f"takes more than {MEBIBYTES} MiB of memory"}
    except Exception as error:  # Jinja's own kinds and whatever a template raises
        line = str(error).strip().partition("\n")[0]
        return {"error": line[:200] or type(error).__name__}
    given = sum(len(message["content"]) for message in request["variables"]["messages"])
    if len(text) > given + CHARACTERS:
        return {"limit": f"adds more than {CHARACTERS:,} characters to the messages"}
    return {"text": text}


def main() -> None:
    """Serves until stdin is closed. A rendering that takes too long ends the process (SIGPROF)."""
    with contextlib.suppress(ImportError, ValueError):  # systems that have no such limit
        import resource

        limit = MEBIBYTES << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a parent that ignores it leaves it ignored
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        answer = json.dumps(reply(json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
