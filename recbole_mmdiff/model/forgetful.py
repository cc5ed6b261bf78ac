"""Modules that keep what they have computed from their weights."""


class Forgetful:
    """Mixin, before the module's class: what was computed is forgotten with the weights that it follows
    from, when these are moved, cast or loaded."""

    def forget(self) -> None:
        """Drop all that was computed from weights."""
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        self.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self.forget()
        return super()._load_from_state_dict(*args, **kwargs)
