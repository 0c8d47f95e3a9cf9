"""What ``pip install -e .`` runs: setuptools' own command, without a notice that says nothing new here.

The folders of the checkout are one package (``ir`` is ``accelpass.ir``), so setuptools installs a finder, and warns each time that
a folder of the package's name beside it may be found first. That folder is the package itself.
"""

from __future__ import annotations

import warnings

from setuptools.command.editable_wheel import editable_wheel


class EditableWheel(editable_wheel):
    """``editable_wheel``; every other warning is shown."""

    def run(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"\s*Editable installation\.")
            super().run()
