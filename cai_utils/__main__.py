"""The command line: `python -m cai_utils run NOTEBOOK [--profile P] [name=value ...]`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from cai_utils.experiment import locks, secrets, stamp
from cai_utils.experiment.execute import check_folder, check_name, execute, one_line
from cai_utils.experiment.files import repo_root
from cai_utils.experiment.params import check_profile, merge_params, parse_override


def run_arguments(command) -> None:
    command.add_argument("notebook", help="its name, for example 04_revision_iterations")
    command.add_argument("values", nargs="*", metavar="name=value",
                         help="parameters, as YAML; settings.ppo.lr=1e-4 sets one entry of a dict")
    command.add_argument("--name", help="name of the executed notebook, for repeated runs")
    command.add_argument("--if-changed", action="store_true",
                         help="do nothing when it would make again what is there")


def run(options) -> None:
    """Run a notebook of notebooks/ on a profile of params/, without a browser."""
    root, profile = repo_root(), options.profile
    notebook = Path(options.notebook).name.removesuffix(".ipynb")
    name = check_name(options.name or notebook)
    overrides = dict(parse_override(text) for text in options.values)
    params = merge_params(root, notebook, profile, overrides)
    folder = check_folder(root / "runs" / profile)
    # Under another name it would write the same rows and models.
    point = stamp.point(root, notebook, profile, overrides)
    with locks.held(folder, {name, point}, f"{point} runs"):
        _run(options, root, notebook, name, overrides, params)


def _run(options, root, notebook, name, overrides, params) -> None:
    profile, folder = options.profile, root / "runs" / options.profile
    now = stamp.ingredients(root, notebook, profile, overrides)
    changed = stamp.changes(folder, name, now) if options.if_changed else []
    if options.if_changed and not changed:
        stamp.touch(folder, name)
        print(f"{name} | up to date", flush=True)
        return
    shown = f", {', '.join(options.values)}" if overrides else ""
    why = f" (changed: {', '.join(changed[:3])}{', ...' * (len(changed) > 3)})" if changed else ""
    print(f"{name} | starts on {profile}{shown}{why}", flush=True)
    locks.remove_leftovers(folder)
    before = time.time()
    executed = execute(root, notebook, params, name)
    stamp.write(folder, name, now)
    if overrides and not options.name:  # the batch would run it with other parameters
        stamp.remove(folder, name)
    print(
        f"{name} | done in {time.time() - before:.0f} s: {executed.relative_to(root)}", flush=True
    )


def redraw_arguments(command) -> None:
    command.add_argument("--figure", help="one of them, for example fig05_revisions")
    command.add_argument("--style", help="a .mplstyle file, on top of the project's style")
    command.add_argument("--from", dest="source", default="figures", choices=("figures", "runs"),
                         help="whose tables")
    command.add_argument("--out", help="another folder to draw into")
    command.add_argument("--if-changed", action="store_true",
                         help="only figures that are older than their tables or the code")


def redraw(options) -> None:
    """Draw a profile's figures, or one, again from saved tables: no notebook runs."""
    from cai_utils.figures import reference

    root = repo_root()
    for folder in ("runs", "figures"):
        locks.remove_leftovers(root / folder / check_profile(root, options.profile))
    folder = reference.redraw(root, options.profile, options.figure, options.style,
                              options.source, options.out, options.if_changed)
    print(f"figures are in {os.path.relpath(folder)}")


def publish(options) -> None:
    """Make a profile's finished run the reference in figures/<profile>/."""
    from cai_utils.figures import reference

    folder = reference.publish(repo_root(), options.profile)
    print(f"{os.path.relpath(folder)} holds the new reference")


# Subcommand -> what adds its arguments; each has --profile. Its help is its docstring.
COMMANDS = {run: run_arguments, redraw: redraw_arguments, publish: lambda command: None}


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and do what it asks; errors are one line on stderr, exit status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m cai_utils", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parsers = {}
    for function, add_arguments in COMMANDS.items():
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.add_argument("--profile", default="miniature", help="a folder of params/")
        add_arguments(command)
        parsers[function.__name__] = command, function
    if not arguments or arguments[0] not in parsers:
        parser.parse_args(arguments)  # --help, or an error
    command, function = parsers[arguments[0]]
    # Values may stand before and after options, which only this method of argparse allows.
    options = command.parse_intermixed_args(arguments[1:])
    locks.end_with_parent()
    try:
        function(options)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {secrets.hidden(one_line(error))}")
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
