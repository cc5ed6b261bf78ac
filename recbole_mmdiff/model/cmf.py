"""CMF: collective matrix factorisation of both domains."""

from recbole_mmdiff.model.mf import MF


class CMF(MF):
    """One matrix factorisation of the union of both domains' ratings.

    Linked users have one vector for both domains (Singh and Gordon 2008, in the form that the
    cross-domain papers use as a baseline: equal weight of the two rating matrices). It is ``MF``
    on ``domain_view: merged``; source items are trained but never ranked.

    Deviations: as in ``MF``.
    """

    citation = ("Singh and Gordon: Relational Learning via Collective Matrix Factorization. "
                "KDD 2008.")
    needs_source = True
    domain_view = "merged"
    domain_views = ("merged",)
