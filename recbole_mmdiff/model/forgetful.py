"""Modules that keep what they have computed from their weights."""


class Forgetful:
    """Mixin, before the module's class: what was computed is forgotten with the weights that it follows
    from, when these are moved, cast or loaded."""

    def forget(self) -> None:
        """Drop all that was computed from weights."""
        raise NotImplementedError

    def outdate(self) -> None:
        """The weights are others, or elsewhere: ``forget``, and what else was made of the former ones."""
        self.forget()

    def _apply(self, fn, recurse=True):
        self.outdate()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self.outdate()
        return super()._load_from_state_dict(*args, **kwargs)
