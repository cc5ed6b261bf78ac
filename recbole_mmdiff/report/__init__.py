"""Reports: from the results store of a comparison to tables, statistics and pictures.

Needs neither torch nor RecBole::

    from recbole_mmdiff.report import Results, format_table, write_report
"""

from recbole_mmdiff.report.results import Results
from recbole_mmdiff.report.writing import format_table, write_report

__all__ = ["Results", "format_table", "write_report"]
