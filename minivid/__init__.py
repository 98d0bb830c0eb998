"""minivid: efficient video generation at toy scale, one measured paper a file.

This file stays nearly empty: import the part that you need (`minivid.world`, `minivid.core`, `minivid.lab`, a chapter).
"""

__version__ = "0.1.0"
