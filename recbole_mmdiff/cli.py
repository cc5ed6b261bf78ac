"""The command line: ``recbole-mmdiff [COMMAND] --model=... --config ... --key=value``."""

import argparse
import os
import sys

from recbole_mmdiff.errors import TOLD, ConfigError, one_of

DESCRIPTION = """\
Train, evaluate and compare recommenders of RecBole and recbole_mmdiff.

  run       train and evaluate one model (the default command)
  compare   run the models, settings and seeds of a comparison file (--config), and write its report
  report    write the tables, tests and pictures of a store of compare: report STORE
  recommend top-K items of a finished run, to a file: recommend RUN --users=cold --output=FILE.csv
  prepare   raw data, images and encoders to data sets and features: prepare --help
  check     print what the data of a configuration hold
  doctor    print versions, active patches, the device, and what is missing

Every configuration key can be given as --key=value, nested ones as --source_domain.dataset=value.
"""
COMMANDS = ("run", "compare", "report", "recommend", "prepare", "check", "doctor")


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command, its own options, and the words that are configuration keys."""
    command = "run"
    if words and not words[0].startswith("-"):
        command, words = words[0], words[1:]
        if command not in COMMANDS:
            raise ConfigError(f"command line: {command!r} is no command, use one of {COMMANDS}")
    if command == "prepare":    # Its commands have options of their own.
        return argparse.Namespace(command=command), words
    parser = argparse.ArgumentParser(
        prog="recbole-mmdiff", description=DESCRIPTION, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", metavar="PATH", help="run folder, results store, folder of the report, or file of "
        "recommendations (.csv, .jsonl, .parquet)")
    if command in ("run", "check", "compare", "doctor"):
        add("--config", action="append", default=[], metavar="FILE",
            help="a YAML file; may be given several times, the last one wins")
    if command in ("run", "check", "doctor"):
        add("--model", help="name of a model, ours or RecBole's")
        add("--dataset", help="a data set, or a pair of domains")
        add("--resume", metavar="DIR", help="go on with the run in this folder")
    if command == "compare":
        add("--workers", type=int, default=1, metavar="N", help="cells at once")
        add("--threads", type=int, default=1, metavar="N", help="threads of each cell")
        add("--executor", default="processes", help="processes (of this machine) or ray")
        add("--gpus", type=int, default=0, metavar="N", help="GPUs of this machine, cells in turn")
    if command == "report":
        add("store", metavar="STORE", help="the results store that compare wrote")
    if command == "recommend":
        _add_recommend(add)
    if command in ("compare", "report"):
        add("--rows", default="settings", help="rows of the tables: settings or models")
        add("--ours", metavar="A,B", help="the models that are held against the best of the others")
        add("--no-plots", action="store_true", help="tables and tests alone")
        add("--pdf", action="store_true", help="pictures as PDF, too")
    options, rest = parser.parse_known_args(words)
    options.command = command
    return options, rest


def _add_recommend(add) -> None:
    add("run", metavar="RUN", help="the folder of a finished run, or a copy of it")
    add("--users", metavar="WHO", help="cold, all, a file with one token a line, or tokens: A,B")
    add("--new-users", metavar="FILE", help="what users outside of the training rated in the source domain: "
        "an atomic file, or .csv")
    add("--items", default="all", metavar="WHICH", help="what is ranked: all, cold, new, a file with one "
        "token a line, or tokens: A,B")
    add("--new-items", metavar="FOLDER", help="features of items outside of the data, which are ranked, too")
    add("-k", type=int, default=10, metavar="K", help="items for each user")
    add("--seen", default="train", help="rows whose items are left out: train, valid (and train) or all")
    add("--skip-unknown", action="store_true", help="leave out users of whom nothing is known")
    add("--device", help="cpu, cuda or cuda:N; the run's own by default")


def main(words: list[str] | None = None) -> int:
    """Run a command; 0 when it succeeded, 2 after what is told in one line: a mistake, a full disk."""
    try:
        options, rest = parse(sys.argv[1:] if words is None else words)
        code = _run_command(options, rest)
        sys.stdout.flush()
        return code
    except TOLD as error:
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        where = f" of process {os.environ.get('RANK', '?')}" if several else ""
        print(f"error{where}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:     # The reader of a pipe, head say, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted; a run goes on with --resume=DIR, compare and prepare with the same command",
              file=sys.stderr)
        return 130


def _run_command(options: argparse.Namespace, rest: list[str]) -> int:
    if options.command == "doctor":
        from recbole_mmdiff import doctor

        return doctor.main()
    if options.command == "prepare":
        from dataset_prep import cli as prepare

        prepare.main(rest)
        return 0
    if options.command in ("report", "recommend") and rest:
        raise ConfigError(f"{options.command}: {rest[0]!r} is not known")
    if options.command == "report":
        _report(options.store, options)
        return 0
    if options.command == "recommend":
        from recbole_mmdiff.recommend import command as recommend

        recommend.main(options)
        return 0
    # Imported here: RecBole and torch take seconds that --help and mistakes need not wait for.
    from recbole_mmdiff.config import parse_overrides

    return (_compare if options.command == "compare" else _run)(options, parse_overrides(rest))


def _run(options: argparse.Namespace, overrides: dict) -> int:
    """``check`` of what a run would read, or the run itself."""
    from recbole_mmdiff.config import find_config_file

    files = [find_config_file(name) for name in options.config]
    arguments = {"model": options.model, "dataset": options.dataset, "config_files": files,
                 "overrides": overrides}
    if options.command == "check":
        from recbole_mmdiff.check import check

        print(check(**arguments))
        return 0
    from recbole_mmdiff.distributed import launched
    from recbole_mmdiff.quick_start import format_metrics, run

    finished = run(**arguments, output=options.output, resume=options.resume)
    if finished is None or (launched() > 1 and os.environ["RANK"] != "0"):
        return 0    # Another process, or another machine, tells.
    print(f"{finished.config['model']} on {finished.config['dataset']}, test:")
    print(format_metrics(finished.metrics["test"]))
    print(f"run folder: {finished.folder}")
    return 0


def _compare(options: argparse.Namespace, overrides: dict) -> int:
    from recbole_mmdiff.compare import compare
    from recbole_mmdiff.report.figures import require_matplotlib
    from recbole_mmdiff.report.tables import ROWS

    if len(options.config) != 1:
        raise ConfigError("compare: give one comparison file, --config=FILE")
    one_of("--rows", options.rows, ROWS)
    if not options.no_plots:
        require_matplotlib()    # Not after hours.
    store = compare(options.config[0], options.output, overrides, options.workers, options.threads,
                    options.executor, options.gpus)
    options.output = None
    return 0 if _report(store, options) else 1


def _report(store, options: argparse.Namespace) -> bool:
    """Write the report and print its tables; whether all cells are done."""
    from recbole_mmdiff.report import Results, write_report

    ours = [label.strip() for label in options.ours.split(",")] if options.ours else None
    paths = write_report(store, options.output, ours, options.rows, plots=not options.no_plots,
                         pdf=options.pdf)
    for path in paths:
        if path.name.startswith("table_") and path.suffix == ".md":
            print(path.read_text(encoding="utf-8"))
    results = Results.load(store)
    print(f"report: {paths[0].parent}")
    states = [results.state(cell) for cell in results.plan.cells]
    for cell, state in zip(results.plan.cells, states, strict=True):
        if state == "failed":
            print(f"failed: {cell.model}, {cell.setting}, {cell.table}, seed {cell.seed}: see "
                  f"{store}/{cell.folder}/error.json", file=sys.stderr)
    return set(states) == {"done"}


if __name__ == "__main__":
    sys.exit(main())
