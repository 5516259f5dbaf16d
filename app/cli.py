"""The command line: `growmoe VERB ...`. Lightning is imported only for the verbs that need it."""

import importlib
import inspect
import keyword
import os
import re
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from modules.errors import InputError, find_input_error

if TYPE_CHECKING:
    from app.parsing import OneLineParser

TRAINER_VERBS = {
    "fit": "train a model, growing it on the way when the recipe says so",
    "validate": "loss and bits per byte of each language on the validation split",
    "plan": "what fit would do with the same configuration: stages, sizes, FLOPs, memory, advice",
    "measure": "step time of the same configuration by stage, where it goes, throughput, MFU, memory",
}
COMMANDS = {
    "prepare": "text, JSONL, parquet or a hub data set into token shards",
    "evaluate": "lm-eval tasks on a checkpoint",
    "generate": "stream a continuation of a prompt",
    "grow": "the transition of a recipe, on a checkpoint instead of inside a run",
    "import": "a Hugging Face model into a checkpoint",
    "export": "a checkpoint into a Hugging Face model",
    "compare": "a study at equal accelerator time: measures, plans, runs every arm, draws the speed-accuracy curve",
    "report": "one self-contained HTML page with plots for a run or a study",
    "doctor": "versions, devices, collectives and files, and what is wrong with them",
}
"""Each verb is the function of its name in `app.commands`; its signature is its command line."""
PLANS = {
    "plan_budget": "compute-optimal sizes for a training budget, by printed scaling laws",
    "plan_moe": "which mixture serves best for a training budget",
    "plan_fit": "a scaling law fitted to runs of your own",
}
"""Commands of their own, which need no configuration of a run."""
CONFIGURED = ("compare",)
"""Commands whose options stand in YAML files (-c), in which options on the command line change single values."""
HOMES = {"import": "exchange", "export": "exchange", "plan_budget": "laws", "plan_moe": "laws", "plan_fit": "laws"}
"""The module of `app.commands` that a verb's function is in, where it is not the verb's own."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; exits with 0, 2 for wrong input (one line), 130 or 143 after a signal, 1 for anything else."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return
    verb, rest = arguments[0], _with_underscores(arguments[1:])
    if f"{verb}_{''.join(rest[:1])}" in PLANS:
        verb, rest = f"{verb}_{rest[0]}", rest[1:]
    try:
        _runner(verb)(rest)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        reason = find_input_error(error)
        if reason is None:
            raise
        sys.stderr.write(f"growmoe {verb.replace('_', ' ')}: {' '.join(str(reason).split())}\n")
        sys.exit(2)


def _with_underscores(arguments: Sequence[str]) -> list[str]:
    """Options as they are called here, also where somebody writes --data-mirror; behind `--` all are words."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    written = re.compile(r"^--[a-zA-Z][\w.-]*(?==|$)")
    named = [
        written.sub(lambda found: "--" + found[0][2:].replace("-", "_"), word, count=1) for word in arguments[:end]
    ]
    return [*named, *arguments[end:]]


def _runner(verb: str) -> Callable[[Sequence[str]], None]:
    if verb in PLANS:
        return lambda rest: _run_command(verb, rest)
    if verb in TRAINER_VERBS:
        return lambda rest: _run_trainer([verb, *rest])
    if verb in COMMANDS:
        return lambda rest: _run_command(verb, rest)
    from difflib import get_close_matches

    near = get_close_matches(verb, [*TRAINER_VERBS, *COMMANDS], n=1)
    hint = f"did you mean {near[0]}?" if near else "see growmoe --help"
    raise InputError(f"{verb!r} is no verb of growmoe; {hint}")


def _run_trainer(arguments: Sequence[str]) -> None:
    _prepare_process()
    from app.allocator import keep_pages
    from app.training import run

    keep_pages()
    if arguments[0] == "plan":
        from app.commands.plan import PlanCLI

        run(["fit", *arguments[1:]], PlanCLI)
    elif arguments[0] == "measure":
        from app.commands.measure import MeasureCLI

        run(["fit", *arguments[1:]], MeasureCLI)
    else:
        run(arguments)


def _run_command(verb: str, arguments: Sequence[str]) -> None:
    _prepare_process()
    signal.signal(signal.SIGTERM, _end)  # so that what is half written is cleared away, as after Ctrl-C
    from jsonargparse import set_parsing_settings

    from app.parsing import OneLineParser, layered_options

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    module = importlib.import_module(f"app.commands.{HOMES.get(verb, verb)}")
    function = getattr(module, f"{verb}_" if keyword.iskeyword(verb) else verb)
    described = COMMANDS | PLANS
    parser = OneLineParser(prog=f"growmoe {verb.replace('_', ' ')}", description=described[verb])
    _add_signature(parser, function)
    if verb in CONFIGURED:
        help = "a YAML file of these options, any number of times; --name.part VALUE changes a value in it"
        parser.add_argument("-c", "--config", metavar="FILE", help=help)
    if verb in CONFIGURED and not {"-h", "--help"} & set(arguments):
        config = parser.parse_object(layered_options(arguments))
    else:
        config = parser.parse_args(_options_first(parser, arguments))
    given = vars(parser.instantiate_classes(config))
    if verb in CONFIGURED:
        del given["config"]  # what its files hold is among the others
    function(**given)


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _add_signature(parser: "OneLineParser", function: Callable[..., None]) -> None:
    """Parameters before the `*` of the signature are positional (a list takes all words), those behind it options; a
    switch may stand without a value."""
    parameters = inspect.signature(function).parameters.values()
    switches = {p.name: p.default for p in parameters if p.annotation is bool}
    for switch, default in switches.items():
        described = _described(function, switch)
        parser.add_argument(f"--{switch}", type=bool, nargs="?", const=True, default=default, help=described)
    options: set[str | int] = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    lists: set[str | int] = {p.name for p in parameters if p.name not in options and p.annotation == list[str]}
    singles: set[str | int] = {p.name for p in parameters if p.name not in options | lists}
    for name in lists:
        parser.add_argument(str(name), nargs="+", type=str, help=_described(function, str(name)))
    done = lists | set(switches)
    parser.add_function_arguments(function, skip=options | done, as_positional=True)
    parser.add_function_arguments(function, as_group=False, skip=singles | done)


def _options_first(parser: "OneLineParser", arguments: Sequence[str]) -> list[str]:
    """The same command line with its options in front: argparse takes words between options for one group only. Behind
    `--` everything is a word, also what begins with a dash."""
    options: list[str] = []
    words: list[str] = []
    rest = deque(arguments)
    while rest:
        word = rest.popleft()
        if word == "--":
            words += rest
            break
        if not re.match(r"--?[a-zA-Z][^\s=]*(=|$)", word):  # "- a list" and -5 are words
            words.append(word)
            continue
        options.append(word)
        action = parser._option_string_actions.get(word)  # None: unknown, or written with its value as --name=value
        is_switch = action is not None and action.nargs == "?"
        takes_next = action is not None and action.nargs is None
        if rest and (takes_next or (is_switch and rest[0].lower() in ("true", "false"))):
            options.append(rest.popleft())
    return [*options, "--", *words] if words else options


def _described(function: Callable[..., None], name: str) -> str:
    """What the docstring says of a parameter."""
    from docstring_parser import parse

    described = {p.arg_name: p.description or "" for p in parse(function.__doc__ or "").params}
    return " ".join(described[name].split())


def _help() -> str:
    plans = {name.replace("_", " "): text for name, text in PLANS.items()}
    verbs = {**TRAINER_VERBS, **plans, **COMMANDS}
    lines = "\n".join(f"  {verb:<11} {text}" for verb, text in verbs.items())
    return (
        "growmoe VERB [options]    (the same as python -m app VERB)\n\n"
        "Train dense and mixture-of-experts language models, and grow them while they train.\n\n"
        f"{lines}\n\ngrowmoe VERB --help shows the options of a verb.\n"
    )


def _prepare_process() -> None:
    """Settings that must stand before torch is imported; libraries' advice stays off the screen, their errors show.

    OpenMP threads that spin while they wait slow a shared machine down several times (docs/log.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(lightning|torch|jsonargparse|torchmetrics)\b")
