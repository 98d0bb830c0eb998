"""How the shared weights are made: one recipe a file, one command for all.

Everything runs on two CPU cores, resumably; with a GPU the same command uses it, and the header of every shipped file says
where it was made and for how long.
"""

from .command import RECIPES, train
from .recipe import Recipe
