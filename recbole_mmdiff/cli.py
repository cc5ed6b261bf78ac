"""The command line: ``recbole-mmdiff [run|check|doctor] --model=... --config ... --key=value``."""

import argparse
import os
import sys

from recbole_mmdiff.errors import CheckpointError, ConfigError, DataError

DESCRIPTION = """\
Train and evaluate recommenders of RecBole and recbole_mmdiff.

  run     train and evaluate one model (the default command)
  check   print what the data of a configuration hold
  doctor  print versions, active patches, the device, and what is missing

Every configuration key can be given as --key=value, nested ones as --source_domain.dataset=value.
"""


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command, its own options, and the words that are configuration keys."""
    commands = ("run", "check", "doctor")
    command = "run"
    if words and not words[0].startswith("-"):
        command, words = words[0], words[1:]
        if command not in commands:
            raise ConfigError(f"command line: {command!r} is no command, use one of {commands}")
    parser = argparse.ArgumentParser(
        prog="recbole-mmdiff", description=DESCRIPTION, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name of a model, ours or RecBole's")
    parser.add_argument("--dataset", help="a data set, or a pair of domains")
    parser.add_argument("--config", action="append", default=[], metavar="FILE",
                        help="a YAML file; may be given several times, the last one wins")
    parser.add_argument("--output", metavar="DIR", help="run folder")
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    options, rest = parser.parse_known_args(words)
    options.command = command
    return options, rest


def main(words: list[str] | None = None) -> int:
    """Run a command; 0 when it succeeded, 2 after a mistake of the user's, told in one line."""
    try:
        options, rest = parse(sys.argv[1:] if words is None else words)
        code = _run_command(options, rest)
        sys.stdout.flush()
        return code
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:     # The reader of a pipe, head say, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted; --resume=DIR goes on with a run", file=sys.stderr)
        return 130


def _run_command(options: argparse.Namespace, rest: list[str]) -> int:
    if options.command == "doctor":
        from recbole_mmdiff import doctor

        return doctor.main()
    # Imported here: RecBole and torch take seconds that --help and mistakes need not wait for.
    from recbole_mmdiff.config import find_config_file, parse_overrides

    files = [find_config_file(name) for name in options.config]
    arguments = {"model": options.model, "dataset": options.dataset, "config_files": files,
                 "overrides": parse_overrides(rest)}
    if options.command == "check":
        from recbole_mmdiff.check import check

        print(check(**arguments))
        return 0
    from recbole_mmdiff.quick_start import format_metrics, run

    finished = run(**arguments, output=options.output, resume=options.resume)
    print(f"{finished.config['model']} on {finished.config['dataset']}, test:")
    print(format_metrics(finished.metrics["test"]))
    print(f"run folder: {finished.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
