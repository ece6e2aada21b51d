"""The command line: ``python -m cai_utils run NOTEBOOK [--profile P] [name=value ...]``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from cai_utils.experiment.execute import execute
from cai_utils.experiment.files import repo_root
from cai_utils.experiment.params import merge_params, parse_override


def run(options) -> None:
    """Run a notebook of notebooks/ on a profile of params/, without a browser."""
    root = repo_root()
    notebook = Path(options.notebook).name.removesuffix(".ipynb")
    name = options.name or notebook
    overrides = dict(parse_override(text) for text in options.values)
    params = merge_params(root, notebook, options.profile, overrides)
    shown = ", ".join(f"{k}={v}" for k, v in overrides.items())
    print(f"{name} | starts on {options.profile}{', ' + shown if shown else ''}", flush=True)
    before = time.time()
    executed = execute(root, notebook, params, name)
    print(
        f"{name} | done in {time.time() - before:.0f} s: {executed.relative_to(root)}", flush=True
    )


def redraw(options) -> None:
    """Draw a profile's figures, or one, again from saved tables: no notebook runs."""
    from cai_utils.figures import reference

    folder = reference.redraw(repo_root(), options.profile, options.figure, options.style,
                              options.source, options.out)
    print(f"figures are in {os.path.relpath(folder)}")


def publish(options) -> None:
    """Make a profile's finished run the reference in figures/<profile>/."""
    from cai_utils.figures import reference

    folder = reference.publish(repo_root(), options.profile)
    print(f"{os.path.relpath(folder)} holds the new reference")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and do what it asks; errors are one line on stderr, exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m cai_utils", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function in (run, redraw, publish):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("--profile", default="miniature", help="a folder of params/")
        if function is run:
            command.add_argument("notebook", help="its name, for example 04_revision_iterations")
            command.add_argument("values", nargs="*", metavar="name=value",
                                 help="parameters, as YAML")
            command.add_argument("--name", help="name of the executed notebook, for repeated runs")
        if function is redraw:
            command.add_argument("--figure", help="one of them, for example fig05_revisions")
            command.add_argument("--style", help="a .mplstyle file, on top of the project's style")
            command.add_argument("--from", dest="source", default="figures",
                                 choices=("figures", "runs"), help="whose tables")
            command.add_argument("--out", help="another folder to draw into")
    options, rest = parser.parse_known_args(arguments)
    if getattr(options, "values", None) is not None:
        # argparse gives up on a list of values that an option stands in.
        options.values += [text for text in rest if "=" in text and not text.startswith("-")]
        rest = [text for text in rest if text not in options.values]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        options.function(options)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
