"""Tags of the random streams that a seed gives to NumPy, `np.random.default_rng((seed, TAG, ...))`.

The bits of runs depend on the tags, so none may change. NumPy takes the missing numbers as 0: `SUBSET` is the stream of
`UPPER_ORDER` in pass 0, and `HELD_OUT` and `MASKED` are one stream. Each of them orders something else.
"""

LOWER_ORDER = 0  # then the epoch: rows of the lower level
UPPER_ORDER = 1  # then the pass: rows of the upper level
SUBSET = 1  # the rows that are read of a source
HELD_OUT = 2  # the rows that are held out of a source
MASKED = 2  # the questions that the model answers, with `method=online`
TRUSTED_PARTS = 3  # the trusted rows that train, steer and measure, with `selection.rule=metagradient`
SIMILARITY = 4  # then the number of rows: those to which the similarity is fitted
ROWS_IN_USE = 5  # the rows whose loss is measured at the end
