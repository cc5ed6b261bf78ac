"""What an evaluation's keys mean together: its passes, its metrics, and the validation score."""

import re

from recbole.evaluator import metric_types, smaller_metrics
from recbole.utils import EvaluatorType, ModelType

from recbole_mmdiff.errors import ConfigError, one_of, suggest

PASSES = ("rating", "ranking_full", "ranking_sampled", "ranking_labeled")
GAINS = ("exponential", "linear")
#: RecBole's modes of evaluation that rank sampled candidates, for instance uni100
SAMPLED_MODE = re.compile(r"(uni|pop)(\d+)")


def separate_metrics(final: dict) -> None:
    """Move value metrics among ``metrics`` to ``rating_metrics``: RecBole refuses the mixture.

    Args:
        final: the merged keys of a configuration; changed in place.

    Raises:
        ConfigError: a name that is no metric of its list.
    """
    metrics = _metric_names("metrics", final["metrics"], metric_types)
    values = [m for m in metrics if metric_types[m.lower()] == EvaluatorType.VALUE]
    ranks = [m for m in metrics if m not in values]
    if values:
        final["rating_metrics"] = values
    _metric_names("rating_metrics", final["rating_metrics"], [
        name for name, kind in metric_types.items() if kind == EvaluatorType.VALUE])
    final["metrics"] = ranks or ["NDCG", "Recall", "Hit"]
    if final["eval_passes"] is None and not ranks:
        final["eval_passes"] = ["rating"]


def check_topk(given) -> None:
    """Raises ConfigError for anything but a whole number from 1, or some of them."""
    lengths = given if isinstance(given, (list, tuple)) else [given]
    if not lengths or not all(type(length) is int and length > 0 for length in lengths):
        raise ConfigError(f"topk: {given!r} is no length of a ranking; use a whole number from 1, or a list "
                          f"of them")


def settle_evaluation(final: dict, model_class: type) -> tuple[str, str]:
    """Settle the passes, and have the validation metric computed.

    Args:
        final: the keys of a configuration, RecBole's derived ones among them; changed in place.
        model_class: of the model that is evaluated.

    Returns:
        The pass and the key of the validation score, for instance ``("ranking_full", "ndcg@10")``.

    Raises:
        ConfigError: a value that is not accepted.
    """
    ranking = {phase: "ranking_sampled" if SAMPLED_MODE.fullmatch(mode) else "ranking_full"
               for phase, mode in final["eval_args"]["mode"].items()}
    if final["eval_passes"] is None:
        final["eval_passes"] = ["rating", ranking["test"], "ranking_labeled"]
    if isinstance(final["eval_passes"], str):
        final["eval_passes"] = [final["eval_passes"]]
    for name in final["eval_passes"]:
        one_of("eval_passes", name, PASSES)
    one_of("labeled_gain", final["labeled_gain"], GAINS)
    valid_pass, metric = _valid_pass_and_metric(final["valid_metric"], ranking["valid"])
    name, _, k = metric.partition("@")
    final["valid_metric_bigger"] = name.lower() not in smaller_metrics
    if k:
        final["topk"] = sorted({*final["topk"], int(k)})
    rates = getattr(model_class, "predicts_ratings", False) \
        or final["MODEL_TYPE"] in (ModelType.CONTEXT, ModelType.DECISIONTREE)
    if valid_pass == "rating" and not rates:
        raise ConfigError(f"valid_metric: {final['model']} does not predict ratings, so "
                          f"{final['valid_metric']!r} has no value; use a ranking metric, for "
                          f"instance NDCG@10")
    computed = "rating_metrics" if valid_pass == "rating" else "metrics"
    if name.lower() not in {known.lower() for known in final[computed]}:
        final[computed] = [*final[computed], name]
    return valid_pass, metric.lower()


def _valid_pass_and_metric(given: str, ranking: str) -> tuple[str, str]:
    """``[PASS.]METRIC[@k]`` in its two parts; a metric alone belongs to its usual pass
    (``ranking`` for a ranking metric)."""
    pass_name, dot, metric = given.partition(".")
    if not dot:
        metric = pass_name
    name, _, k = metric.partition("@")
    kind = metric_types.get(name.lower())
    if not dot:
        pass_name = "rating" if kind == EvaluatorType.VALUE else ranking
    one_of("valid_metric", pass_name, PASSES)
    fits = (kind == EvaluatorType.VALUE) == (pass_name == "rating") \
        and (pass_name != "ranking_labeled" or name.lower() == "ndcg")
    without_k = kind == EvaluatorType.VALUE or name.lower() == "gauc"
    if kind is None or not fits or (k != "" if without_k else not (k.isdecimal() and int(k))):
        raise ConfigError(f"valid_metric: {given!r}: use one of {sorted(metric_types)}, ranking "
                          f"ones with @k (NDCG@10), of ranking_labeled only NDCG")
    return pass_name, metric


def _metric_names(key: str, given, known) -> list[str]:
    """``given`` as a list of names of which each is in ``known`` (lower case)."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, (list, tuple)):
        raise ConfigError(f"{key}: {given!r} is no list of metrics, use some of {sorted(known)}")
    for name in names:
        if not isinstance(name, str) or name.lower() not in known:
            raise ConfigError(f"{key}: {name!r} is no metric of RecBole's that belongs here, use "
                              f"some of {sorted(known)}{suggest(str(name), known)}")
    return list(names)
