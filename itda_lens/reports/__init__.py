"""What users look at: tables in the terminal."""

from itda_lens.reports.tables import (
    decomposition_table,
    evaluation_table,
    info_table,
    labels_table,
    make_console,
)

__all__ = ["decomposition_table", "evaluation_table", "info_table", "labels_table", "make_console"]
