"""A static site about a dictionary: plain data first (`facts`), pages from them second (`pages`)."""

from itda_lens.reports.site.facts import SiteFacts, comparison_facts, site_facts
from itda_lens.reports.site.pages import save_site, site_folder, write_site
from itda_lens.reports.site.reading import facts_from_texts

__all__ = [
    "SiteFacts",
    "comparison_facts",
    "facts_from_texts",
    "save_site",
    "site_facts",
    "site_folder",
    "write_site",
]
