"""Parses the flags of many commands, each in a process forked from this one.

Reads `[[page, [module, argument, …]], …]` from stdin; prints what is not understood.
"""

import importlib
import importlib.util
import json
import os
import sys
import traceback

from absl import flags

from ema_jax.__main__ import COMMANDS, OTHERS
from ema_jax.runtime import cli

WITHOUT_FLAGS = ("ema_jax.lm_eval", "ema_jax.refusal.train_lexical")  # argparse's


def parse(module: str, arguments: list[str]) -> None:
    if module == "ema-jax":
        name, *arguments = arguments
        if name in OTHERS or name.startswith("--"):
            return
        module, added = COMMANDS[name].module, COMMANDS[name].added
        arguments = [*added, *arguments]
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"no module {module}"
    name = f"{module}.__main__" if spec.submodule_search_locations else module
    command = importlib.import_module(name)
    if module in WITHOUT_FLAGS:
        return
    command.define_flags()
    cli._parse_flags([module, *arguments], positional=True)
    if "config" in flags.FLAGS and any(a.startswith("--config=") for a in arguments):
        from ema_jax.study.flags import read_config

        read_config()


def main() -> None:
    wanted = json.load(sys.stdin)
    for module in ("ema_jax.main", "ema_jax.judge", "ema_jax.convert", "ema_jax.config"):
        importlib.import_module(module)
    for page, (module, *arguments) in wanted:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            parse(module, arguments)
        except BaseException:
            error = traceback.format_exc().strip().splitlines()[-1]
            print(f"{page}: {' '.join([module, *arguments])}: {error}", flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
