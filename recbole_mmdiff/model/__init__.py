"""The models, one paper a file, and how a name becomes a class."""

from recbole_mmdiff.model.registry import MODELS, get_model, register_model

__all__ = ["MODELS", "get_model", "register_model"]
