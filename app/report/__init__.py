"""The report of a run.

In the order of reading: `data` (what the run directory holds), `words` (numbers and models as people write them),
`drawing` and `plots` (figures), `load` and `heatmaps` (experts), `tables`, `document` (HTML), `page` (all of it),
`theme` (its colours).
"""
