"""A study of models at equal accelerator time.

In the order of work: `design` (what is compared), `measuring` (step times, on one machine), `budget` (steps of every
run), `running` (runs, each once, also over crashes), `results` (what a finished run came to), `analysis` (means,
fronts, ratios), `tables` and `picture` (what people read).
"""
