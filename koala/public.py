"""Makes values safe to print and to publish: strict JSON, without control characters and without secrets."""

import json
import math
import os
import re

# C0 and C1 controls, which terminals execute, and the marks that reverse the direction of text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def plain(value):
    """`value` as strict JSON that any terminal can print: non-finite numbers become None, keys become strings, and
    control characters become escape sequences."""
    if isinstance(value, dict):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), value)
    return value


def secrets() -> dict[str, str]:
    """{name: value} of the environment variables whose names look like those of secrets."""
    return {
        name: value
        for name, value in os.environ.items()
        if len(value) >= 8
        and re.search("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", name, re.IGNORECASE)
        and not os.path.exists(value)  # the path of a file that holds a secret
    }


def public(value):
    """`plain(value)` with the value of each secret replaced by its name: safe to write to records and W&B."""
    text = json.dumps(plain(value), allow_nan=False)
    for name, secret in secrets().items():
        text = text.replace(json.dumps(secret)[1:-1], f"<{name}>")
    return json.loads(text)
