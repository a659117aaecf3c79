"""Commands have short names: `python -m experiments.table3` runs `experiments/paper/table3.py`."""

import pathlib

__path__ += [str(pathlib.Path(__file__).parent / folder) for folder in ("paper", "selection", "didactic", "reliability")]
