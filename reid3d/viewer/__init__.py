"""Showing ranked results: a page that opens in any browser. (The public function `reid3d.view` lives here.)"""

from .html import view

__all__ = ["view"]
