"""What a test needs that only Unix has; it is skipped where that is not there, and says so."""

from __future__ import annotations

import importlib

import pytest


def there(name: str) -> bool:
    """Whether ``module.attribute``, a module, or a file that can be opened is there."""
    if name.startswith("/"):
        try:
            open(name, "rb").close()
        except OSError:
            return False
        return True
    module, _, attribute = name.partition(".")
    try:
        found = importlib.import_module(module)
    except ImportError:
        return False
    return not attribute or hasattr(found, attribute)


def needs(*names: str) -> pytest.MarkDecorator:
    """Skip a test where one of these is missing: ``needs("os.mkfifo", "fcntl")``."""
    missing = [name for name in names if not there(name)]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} here")
