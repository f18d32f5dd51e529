"""The package behind the course on large models: one module a noun.

Import modules, not names, so that every call shows its home::

    from bigmodel_utils import claims, data, models, train
"""

__version__ = "0.1.0"
