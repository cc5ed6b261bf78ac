"""``recbole-mmdiff prepare WHAT ...``: from raw data to files that every model can train on."""

from __future__ import annotations

import argparse
import importlib

from recbole_mmdiff.errors import ConfigError, DataError, WriteError, suggest

#: what can be prepared: the module that does it, and what it does
COMMANDS = {
    "amazon": ("dataset_prep.amazon",
               "Amazon reviews of 2014, 2018 or 2023 to atomic files; presets of the papers"),
    "mmrec": ("dataset_prep.mmrec",
              "MMRec's prepared sets to atomic files, features and the benchmark split"),
    "images": ("dataset_prep.download", "fetch the images of items, or check a folder of them"),
    "encode": ("dataset_prep.encode_command",
               "features of items or users by an encoder of text, images or both"),
    "features": ("dataset_prep.check_features",
                 "check stored features in full; convert those in RecBole's text form"),
}
#: the extra of recbole-mmdiff that brings an optional package
EXTRAS = {"polars": "prep", "httpcore": "prep", "PIL": "features", "transformers": "features",
          "sentence_transformers": "features"}


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults that are something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())


def main(words: list[str]) -> None:
    """Run one preparation; ``words`` are the command line after ``prepare``.

    Raises:
        ConfigError: an unknown command.
        DataError: an optional package is missing; and both as the command finds them.
    """
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: recbole-mmdiff prepare WHAT [options]\n\n{_overview()}\n\n"
              f"recbole-mmdiff prepare WHAT --help explains its options.")
        return
    name, *rest = words
    if name not in COMMANDS:
        raise ConfigError(f"prepare: {name!r} is not known, use one of {', '.join(COMMANDS)}"
                          f"{suggest(name, COMMANDS)}")
    try:
        _run(name, rest)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise DataError(f"prepare {name}: needs the package {package!r}; "
                        f"pip install 'recbole-mmdiff[{EXTRAS[package]}]'") from error
    except WriteError as error:
        raise DataError(f"prepare {name}: {error}") from error
    except BrokenPipeError:     # Nobody reads what is printed: no matter of the files.
        raise
    except OSError as error:
        raise DataError(f"prepare {name}: {error.filename or 'a file'} cannot be read or written "
                        f"({error.strerror or error})") from error


def _run(name: str, words: list[str]) -> None:
    module, text = COMMANDS[name]
    command = importlib.import_module(module)
    parser = argparse.ArgumentParser(
        prog=f"recbole-mmdiff prepare {name}", description=f"{text[0].upper()}{text[1:]}.",
        allow_abbrev=False, formatter_class=_Defaults)
    command.add_arguments(parser)
    command.main(parser.parse_args(words))
