"""`shoal plan`: what a model costs on a machine, by formulas that fit on a page."""
