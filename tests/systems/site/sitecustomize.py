"""Python's own start-up hook: a process that is started with this folder on its path is as the
environment says; see ``portable``."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import portable

sys.path.pop(0)
portable.apply(os.environ.get(portable.WAYS, ""))
