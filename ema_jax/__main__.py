"""One command for everything: `ema-jax COMMAND --flag=value …`, or `python -m ema_jax …`."""

import runpy
import sys
from typing import NamedTuple

import ema_jax
from ema_jax.errors import UserError, did_you_mean
from ema_jax.runtime import cli


class Command(NamedTuple):
    """A command: what it does, the module that it is, and flags that it adds."""

    meaning: str
    module: str
    added: tuple[str, ...] = ()


COMMANDS = {
    "run": Command("a study: --config=FILE --workdir=DIR", "ema_jax.main"),
    "dry-run": Command("validate a study and print its plan", "ema_jax.main", ("--dry_run",)),
    "report": Command(
        "figures and report again, of what was measured",
        "ema_jax.main",
        ("--stage=analyse,report",),
    ),
    "compare": Command("finished studies side by side, on one page", "ema_jax.compare"),
    "reproduce": Command(
        "a study measured again from its reproduce.json: FILE --workdir=DIR", "ema_jax.reproduce"
    ),
    "init": Command("write a config to edit", "ema_jax.init"),
    "judge": Command("verdicts for a file of responses", "ema_jax.judge"),
    "convert": Command("a checkpoint from one format to another", "ema_jax.convert"),
    "sweep": Command("a grid of studies, by any number of workers", "ema_jax.sweep"),
    "check": Command("does a study fit a TPU slice, or a GPU?", "ema_jax.compile_check"),
    "organism": Command("train the embedded models", "ema_jax.organism.train"),
    "refuse": Command("tune a model to refuse in the domains", "ema_jax.organism.refuse"),
    "share": Command("a study as a table, as a log for Inspect, on the Hub", "ema_jax.share"),
    "lm-eval": Command("lm-evaluation-harness on a checkpoint", "ema_jax.lm_eval"),
}
OTHERS = {"completion": "print a completion script for bash or zsh", "help": "this text"}

_COMPLETION = """\
# In ~/.bashrc: eval "$(ema-jax completion bash)"; in ~/.zshrc, after compinit: … completion zsh
_ema_jax() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
  elif [[ "$word" == --* ]]; then
    local flags="$("${{COMP_WORDS[0]}}" "${{COMP_WORDS[1]}}" --help 2>/dev/null \
      | sed -n 's/^  \\(--[a-zA-Z_.]*=\\{{0,1\\}}\\).*/\\1/p')"
    COMPREPLY=($(compgen -W "$flags" -- "$word"))
    [[ "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace 2>/dev/null
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -o filenames -F _ema_jax ema-jax
"""


def main() -> None:
    """Runs the command that the first argument names, as `python -m` runs its module."""
    name, *rest = sys.argv[1:] or ["help"]
    if name in COMMANDS:
        command = COMMANDS[name]
        sys.argv = [f"ema-jax {name}", *command.added, *rest]
        runpy.run_module(command.module, run_name="__main__", alter_sys=True)
    elif name in ("help", "--help", "-h", "-help"):
        print(_usage())
    elif name in ("--version", "-V", "version"):
        print(f"ema_jax {ema_jax.__version__}")
    elif name == "completion":
        print(_completion(rest))
    else:
        known = [*COMMANDS, *OTHERS]
        fix = did_you_mean(name, known) or f"; there are: {', '.join(known)}"
        cli.exit_with("error", f"ema-jax: no command {name!r}{fix}", UserError.exit_code)


def _usage() -> str:
    entries = {**{name: command.meaning for name, command in COMMANDS.items()}, **OTHERS}
    lines = [f"  {name:11} {meaning}" for name, meaning in entries.items()]
    return "\n".join(
        [
            "ema-jax COMMAND --flag=value …: emergent misalignment from refusal unlearning",
            "",
            *lines,
            "",
            "ema-jax COMMAND --help lists a command's flags; ema-jax --version the version.",
            "First study, minutes on a laptop: ema-jax run --config=tiny --workdir=runs/tiny",
        ]
    )


def _completion(rest: list[str]) -> str:
    if rest not in (["bash"], ["zsh"]):
        cli.exit_with("error", "ema-jax completion: name the shell, bash or zsh", 2)
    script = _COMPLETION.format(commands=" ".join([*COMMANDS, *OTHERS]))
    return script if rest == ["bash"] else f"autoload -U +X bashcompinit && bashcompinit\n{script}"


if __name__ == "__main__":
    main()
