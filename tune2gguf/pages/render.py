"""Pages from templates. All values are escaped, and control characters are spelled out."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

# Control characters except tab and line break, characters that reorder text, and lone surrogates, which UTF-8 cannot
# encode. Joiners stay: emoji and some scripts need them.
_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)


def render_page(template: str, **values: Any) -> str:
    """Return a page from a template of this package.

    Its content security policy allows only its own script and no requests. Even text that was not escaped could not
    run.
    """
    script = _read_asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _make_environment().get_template(template)
    return page.render(style=_read_asset("page.css"), script=script, script_hash=f"sha256-{digest}", **values)


@cache
def _make_environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tune2gguf.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Called on every value before it is escaped.
        finalize=_finalize,
    )
    environment.filters["count"] = "{:,}".format
    return environment


def _finalize(value: Any) -> Any:
    r"""Return text with the characters of _ACTING spelled out, as \x1b or \u202e; other values unchanged."""
    # Markup is a str, but comes from this package.
    return _ACTING.sub(lambda found: repr(found[0])[1:-1], value) if type(value) is str else value


def format_loss(value: float) -> str:
    """Return a loss with three decimals, or with two significant digits below 0.01."""
    return f"{value:.3f}" if not 0 < abs(value) < 0.01 else f"{value:.2g}"


def format_interval(low: float | None, high: float | None) -> str:
    """Return an interval of losses, a dash if there is none."""
    return "–" if low is None or high is None else f"{format_loss(low)} – {format_loss(high)}"


@cache
def _read_asset(name: str) -> str:
    return (files("tune2gguf.pages") / "templates" / name).read_text(encoding="utf-8")
