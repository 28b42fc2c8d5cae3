"""Results for people: tables in the terminal, plots in files, a site in a folder."""

from itda_lens.reports.benchmarks import bench_table, pareto_plot
from itda_lens.reports.comparisons import (
    comparison_heatmap,
    comparison_record,
    comparison_table,
    differences_record,
    differences_table,
    layers_table,
    save_comparison,
    save_differences,
)
from itda_lens.reports.control import chosen_table, effects_table, save_effects, writings_table
from itda_lens.reports.neuronpedia import (
    neuronpedia_features,
    neuronpedia_id,
    save_neuronpedia_features,
)
from itda_lens.reports.site import (
    SiteFacts,
    comparison_facts,
    facts_from_texts,
    save_site,
    site_facts,
    site_folder,
    write_site,
)
from itda_lens.reports.tables import (
    decomposition_table,
    evaluation_table,
    info_facts,
    info_table,
    labels_table,
    matches_table,
)
from itda_lens.terminal import make_console, printable, shown

__all__ = [
    "SiteFacts",
    "bench_table",
    "chosen_table",
    "comparison_facts",
    "comparison_heatmap",
    "comparison_record",
    "comparison_table",
    "decomposition_table",
    "differences_record",
    "differences_table",
    "effects_table",
    "evaluation_table",
    "facts_from_texts",
    "info_facts",
    "info_table",
    "labels_table",
    "layers_table",
    "make_console",
    "matches_table",
    "neuronpedia_features",
    "neuronpedia_id",
    "pareto_plot",
    "printable",
    "save_comparison",
    "save_differences",
    "save_effects",
    "save_neuronpedia_features",
    "save_site",
    "shown",
    "site_facts",
    "site_folder",
    "write_site",
    "writings_table",
]
