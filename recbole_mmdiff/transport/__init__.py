"""Item graphs fused, items clustered, users matched: solvers on tensors, usable alone.

    from recbole_mmdiff.transport import cluster_items, fuse_graphs, match_users

Each returns its result and a ``SolverLog``, and warns (``NotConverged``) if it did not converge.
"""

from recbole_mmdiff.transport._log import NotConverged, SolverLog
from recbole_mmdiff.transport.balanced import balanced_assignment
from recbole_mmdiff.transport.cost import COST_SCALES, user_costs
from recbole_mmdiff.transport.goum import GUIDANCE, match_users
from recbole_mmdiff.transport.gromov import fused_gromov
from recbole_mmdiff.transport.matching import Matching
from recbole_mmdiff.transport.risgf import fuse_graphs
from recbole_mmdiff.transport.sishe import cluster_items

__all__ = [
    "COST_SCALES",
    "GUIDANCE",
    "Matching",
    "NotConverged",
    "SolverLog",
    "balanced_assignment",
    "cluster_items",
    "fuse_graphs",
    "fused_gromov",
    "match_users",
    "user_costs",
]
