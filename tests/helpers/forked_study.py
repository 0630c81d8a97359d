"""Runs studies in forks of one process that has imported everything: a start costs no imports.

Reads the arguments of a run and the file for its stderr, as JSON, a line each; answers with the
process's id, and with its exit code once it has ended.
"""

import json
import os
import runpy
import sys


def main() -> None:
    """Serves runs until its input ends; in a fork, is the run."""
    for line in sys.stdin:
        arguments, said = json.loads(line)
        process = os.fork()
        if process == 0:
            _redirect(said)
            sys.argv = ["ema_jax.main", *arguments]
            runpy.run_module("ema_jax.main", run_name="__main__", alter_sys=True)
            return
        print(process, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(code, flush=True)


def _redirect(said: str) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)


if __name__ == "__main__":
    # What a study imports, here or late; no backend is started, which a fork would break.
    import matplotlib.backends.backend_svg
    import matplotlib.pyplot  # noqa: F401
    import transformers

    import ema_jax.study.runner  # noqa: F401

    transformers.PreTrainedTokenizerFast  # noqa: B018, imported at its first use
    main()
