"""Prompts: texts in files, with places to fill in."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from recbole_mmdiff.errors import DataError, suggest

PROMPTS = Path(__file__).with_name("prompts")


class Prompt:
    """A text with ``{name}`` places to fill in; braces that stand for themselves are doubled.

    Only plain names are accepted: no attributes, indices, conversions or formats.
    """

    def __init__(self, template: str, where: str) -> None:
        self.template, self.where = template, where
        self.names: list[str] = []
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise DataError(f"{where}: not a prompt ({error}); write {{{{ and }}}} for braces that "
                            f"stand for themselves") from error
        for _, name, form, conversion in parts:
            if name is None:
                continue
            if form or conversion or not name.isidentifier():
                place = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
                raise DataError(f"{where}: {{{place}}} is not accepted; write {{column}}, a plain name "
                                f"without attributes, indices, conversions or formats")
            self.names.append(name)
        if not self.names:
            raise DataError(f"{where}: has no {{place}} to fill in, so every text would be the same")

    @classmethod
    def read(cls, path: str | Path) -> Prompt:
        """The prompt in a UTF-8 file, without white space around it."""
        try:
            return cls(Path(path).read_text(encoding="utf-8").strip(), str(path))
        except OSError as error:
            raise DataError(f"--prompt: {path} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise DataError(f"--prompt: {path} is not UTF-8 text ({error})") from error

    def check(self, known: Sequence[str]) -> None:
        """Raises DataError for a place that none of the ``known`` names fills."""
        for name in self.names:
            if name not in known:
                raise DataError(f"{self.where}: {{{name}}} is unknown, there are "
                                f"{', '.join(known)}{suggest(name, known)}")

    def fill(self, values: Mapping[str, str]) -> str:
        """The prompt with its places filled."""
        return "".join(literal + (values[name] if name is not None else "")
                       for literal, name, _, _ in string.Formatter().parse(self.template))

    def describe(self) -> dict[str, str]:
        return {"prompt": self.template,
                "prompt_sha256": hashlib.sha256(self.template.encode()).hexdigest()}
