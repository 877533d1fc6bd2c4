"""Few-shot regression and classification on users' own tables."""

from metareg_table.encoding import Encoding, StandardisedColumns
from metareg_table.models import TableMLP
from metareg_table.tasks import TableFolder

__all__ = ["Encoding", "StandardisedColumns", "TableFolder", "TableMLP"]
