"""Chat templates, rendered by a process of their own (`template_process.py`).

They are programs that a stranger wrote. Jinja's sandbox keeps them from files, but not from loops
without end or from gigabytes of text. Of a process both can be limited, whatever the means.
"""

import atexit
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ema_jax.data import template_process
from ema_jax.errors import UserError

DAY = datetime.date(2024, 7, 26)
"""What the clock tells: a template that writes today's date renders another prompt tomorrow."""


class TemplateError(UserError):
    """A chat template that refuses its messages, or is wrong.

    Attributes:
        what: in its own words.
    """

    def __init__(self, where: str, what: str):
        super().__init__(f"{where}: the chat template fails ({what}); correct it")
        self.what = what


class TemplateLimitError(UserError):
    """A chat template that takes more time or memory than is allowed."""


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The text of transformers' `apply_chat_template` for messages of text.

    Args:
        tokenizer: a transformers tokenizer with a template.
        messages: each with `role` and `content`.
        add_generation_prompt: whether the next response is opened.
        **variables: that the template sees besides, in the types of JSON.

    Raises:
        TemplateError: there is no template, or it raises.
        TemplateLimitError: it takes more than `template_process.SECONDS` of processor time or
            `MEBIBYTES` of memory, or adds more than `CHARACTERS` to the messages.
    """
    seen: dict[str, Any] = {**tokenizer.special_tokens_map, **variables}
    seen |= {"messages": messages, "tools": None, "documents": None}
    seen["add_generation_prompt"] = add_generation_prompt
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise TemplateError(tokenizer.name_or_path, "there is none") from None
    reply = _PROCESS.ask({"template": template, "day": DAY.isoformat(), "variables": seen})
    if "error" in reply:
        raise TemplateError(tokenizer.name_or_path, reply["error"])
    if "limit" in reply:
        raise TemplateLimitError(
            f"{tokenizer.name_or_path}: the chat template {reply['limit']}; use another"
        )
    return reply["text"]


class _Process:
    """The process that renders: started when it is first needed, and again where it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        atexit.register(self._stop)

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        """Its reply, which says so if it ended over the request."""
        data = json.dumps(request).encode() + b"\n"
        with self._lock:
            child = self._running()
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write(data)
                child.stdin.flush()
                line = child.stdout.readline()
            except BrokenPipeError:
                line = b""
            except BaseException:  # its reply to this request must not become another's
                self._stop()
                raise
            if line:
                return json.loads(line)
            code = child.wait()
            self._stop()
        if code == -signal.SIGPROF:
            return {"limit": f"takes more than {template_process.SECONDS} s of computing"}
        return {"limit": f"ended the process that rendered it (exit code {code})"}

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._owner != os.getpid():  # after a fork it is the parent's
            self._child = None
        if self._child is None or self._child.poll() is not None:
            self._owner = os.getpid()
            # A preloaded allocator may take more address space for itself than is allowed.
            environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
            self._child = subprocess.Popen(
                # Without `site`, which takes longer than all else: the path is given.
                [sys.executable, "-S", "-P", str(Path(template_process.__file__))],
                env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is not meant for it
            )
        return self._child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


_PROCESS = _Process()
